"""The export stage's part of a recipe: ``ExportConfig(...)``; the nano values are the defaults."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from components.artifacts import StageConfig

FileType = Literal["f32", "f16", "q4_0"]


class HeadPredictorConfig(StageConfig):
    """How the predictor of the output rows that matter is trained (``components.export.head_predictor``)."""

    width: int = Field(128, ge=8, le=4096, description="of its inner vector")
    top_rows: int = Field(32, ge=1, le=1024, description="greatest logits per position that have to be found")
    target_recall: float = Field(0.99, gt=0.5, lt=1, description="share of them that the threshold lets pass")
    positions: int = Field(60_000, ge=512, description="held-out tokens whose states are collected")
    window: int = Field(256, ge=16, description="tokens that the model reads together")
    training_share: float = Field(
        0.6, gt=0, lt=1, description="of the positions; half of the rest sets the threshold, half reports"
    )
    steps: int = Field(600, ge=1, description="optimiser steps")
    batch: int = Field(128, ge=1, description="positions per step")
    learning_rate: float = Field(0.005, gt=0, description="Adam's, relative to the spread of the weights")
    precision: Literal["q4_0", "f16"] = Field(
        "q4_0", description="of the file's tensors; F16 where blocks of 32 do not divide them"
    )


class ExportConfig(StageConfig):
    """Which files are written, in which precision, and how they are checked."""

    OPT_IN: ClassVar[frozenset[str]] = frozenset({"head_predictor"})

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
    head_predictor: HeadPredictorConfig | None = Field(
        None,
        description="train a predictor of the output rows that matter and write it into the GGUF files, for "
        "runtime_cpu when it is asked to use it; llama.cpp then refuses these files; null writes none",
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
