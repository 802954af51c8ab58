"""The export stage's part of a recipe: ``ExportConfig(...)``; the nano values are the defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from components.artifacts import StageConfig

FileType = Literal["f32", "f16", "q4_0"]


class ExportConfig(StageConfig):
    """Which files are written, in which precision, and how they are checked."""

    hf_dtype: Literal["same", "float32", "bfloat16"] = Field(
        "same", description="precision of the Hugging Face folder; 'same' keeps the merged model's"
    )
    shard_bytes: int = Field(
        5_000_000_000, ge=1_000_000, description="largest weight file of that folder, in bytes"
    )
    max_position_embeddings: int | None = Field(
        None, ge=1, le=1 << 24, description="context written into the files; null keeps the merged model's"
    )
    gguf: tuple[FileType, ...] = Field(
        ("f32", "f16", "q4_0"), description="GGUF files to write, by precision"
    )
    q4_0_output: Literal["q4_0", "q8_0", "f16"] = Field(
        "q8_0",
        description="precision of the output matrix in the q4_0 file (of the embedding when they are tied); "
        "it decides every logit and Q4_0 costs more there than anywhere",
    )
    onnx: bool = Field(True, description="write and verify an ONNX graph of the whole-sequence forward pass")
    onnx_max_parameters: int = Field(
        100_000_000,
        ge=1,
        description="larger models are not exported to ONNX: its graph computes every expert for every token",
    )
    verify_tokens: int = Field(
        320, ge=2, le=4096, description="length of the sequences that compare the files"
    )
    verify_max_parameters: int = Field(
        1_000_000_000,
        ge=1,
        description="larger models are compared tensor by tensor only, without holding two models in memory",
    )
    threads: int = Field(2, ge=1, le=512, description="CPU threads of the process")
    seed: int = Field(0, ge=0, description="seed of the token ids that compare the files")

    @model_validator(mode="after")
    def _check(self) -> ExportConfig:
        if len(set(self.gguf)) != len(self.gguf):
            raise ValueError(f"gguf is {list(self.gguf)}; each precision may be named once")
        return self
