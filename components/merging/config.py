"""The merging stage's part of a recipe: ``MergeConfig(...)``; the nano values are the defaults."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from components.artifacts import StageConfig

_NANO_CANDIDATES: tuple[dict[str, float], ...] = (
    {"sft": 1.0},
    {"sft": 0.8, "stage3": 0.2},
    {"sft": 0.6, "stage3": 0.4},
    {"sft": 0.4, "stage3": 0.6},
    {"stage3": 1.0},
    {"sft": 0.5, "sft-mid": 0.5},
    {"sft": 0.8, "stage2": 0.2},
)


class MergeConfig(StageConfig):
    """Which checkpoints are merged at which weights, and how one of the candidates is chosen."""

    candidates: tuple[dict[str, float], ...] = Field(
        _NANO_CANDIDATES,
        min_length=1,
        max_length=256,
        description="weights by checkpoint: stage1, stage2, stage3, sft, sft-mid (the first kept point of SFT), or "
        "the name of a folder under posttrain's checkpoints/; weights are divided by their sum",
    )
    allow_rope_change: bool = Field(
        True,
        description="let checkpoints differ in rope_theta; the result takes that of its heaviest checkpoint",
    )
    tasks: tuple[str, ...] = Field(
        ("topic", "arithmetic"),
        min_length=1,
        max_length=32,
        description="evaluation sets that decide (dev items)",
    )
    task_items: int = Field(150, ge=10, le=100_000, description="development items of each task")
    text_tokens_per_category: int = Field(
        1024, ge=64, description="held-out tokens per category scored in bits per byte"
    )
    context: int = Field(512, ge=8, le=1 << 20, description="tokens of a held-out window")
    bits_per_byte_weight: float = Field(
        0.25,
        ge=0.0,
        le=100.0,
        description="score given up per relative rise of bits per byte over the best candidate",
    )
    shard_bytes: int = Field(
        5_000_000_000,
        ge=1_000_000,
        description="largest weight file; also bounds the memory that merging needs",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where candidates are scored")
    threads: int = Field(2, ge=1, le=512, description="CPU threads of the process")

    @field_validator("candidates")
    @classmethod
    def _check_candidates(cls, candidates: tuple[dict[str, float], ...]) -> tuple[dict[str, float], ...]:
        for candidate in candidates:
            if not candidate:
                raise ValueError("a candidate names no checkpoint; each needs at least one")
            for name, weight in candidate.items():
                if not math.isfinite(weight) or weight < 0.0:
                    raise ValueError(f"{name} has the weight {weight}; weights are finite and not negative")
            if math.fsum(candidate.values()) <= 0.0:
                raise ValueError(f"the weights of {candidate} sum to 0; at least one must be positive")
        return candidates
