"""The part of a recipe that says what is measured on which devices: ``BenchmarkConfig()`` is nano."""

from __future__ import annotations

from pydantic import Field

from components.artifacts import StageConfig


class BenchmarkConfig(StageConfig):
    """How the engine is measured; defaults are the nano recipe's."""

    devices: tuple[str, ...] = Field(
        default=("local",),
        min_length=1,
        description="names of the device matrix to measure; the others are listed as not asked for",
    )
    matrix: str = Field(
        default="infra/devices/matrix.toml", description="the device matrix, relative to the project"
    )
    runs: int = Field(default=5, ge=1, le=1_000, description="interleaved runs per file and thread count")
    prompt_tokens: int = Field(default=128, ge=1, le=1 << 20, description="tokens of the prompt measured")
    decode_tokens: int = Field(default=64, ge=1, le=1 << 20, description="tokens generated after it")
    heldout_tokens: int = Field(
        default=12_288,
        ge=2,
        le=1 << 30,
        description="held-out tokens for perplexity, shared among the categories",
    )
    window_tokens: int = Field(
        default=256,
        ge=2,
        le=1 << 20,
        description="held-out tokens that are predicted together, in windows side by side",
    )
    check_tokens: int = Field(
        default=512,
        ge=0,
        le=1 << 16,
        description="tokens whose F32 logits are compared with torch's; 0 where torch cannot hold the model",
    )
    max_logits_error: float = Field(
        default=1e-4,
        gt=0,
        le=1,
        description="largest allowed distance of a row of F32 logits from torch's, relative to the row's length",
    )
    max_q4_0_perplexity_increase: float = Field(
        default=0.5,
        gt=0,
        le=100,
        description="largest allowed relative increase of perplexity from F32 to Q4_0",
    )
    timeout_s: float = Field(
        default=3_600.0, gt=0, description="longest time for one measurement of one file"
    )
