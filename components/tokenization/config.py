"""The part of a recipe that says which vocabulary is used: ``TokenizeConfig()`` is nano."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.artifacts import StageConfig

QWEN_PADDED_VOCABULARY = 151_936


class TokenizeConfig(StageConfig):
    """How text becomes tokens; defaults are the nano recipe's."""

    tokenizer: Literal["train", "qwen"] = Field(
        default="train",
        description="train: a byte-level BPE with Qwen's pre-tokenizer; qwen: Qwen's own vocabulary",
    )
    vocab_size: int = Field(
        default=4_096,
        ge=300,
        le=262_144,
        description="rows of the model's embedding, special tokens included; 151936 (padded) for qwen",
    )
    training_bytes: int = Field(
        default=6_000_000, ge=100_000, description="UTF-8 bytes of training text the BPE is trained on"
    )
    workers: int = Field(default=2, ge=1, le=1_024, description="processes and threads working at once")
    seed: int = Field(default=20, ge=0, lt=2**31, description="seed of the sample and of document order")

    @model_validator(mode="after")
    def _check_vocabulary(self) -> Self:
        if self.tokenizer == "qwen" and self.vocab_size != QWEN_PADDED_VOCABULARY:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, but tokenizer = 'qwen' needs {QWEN_PADDED_VOCABULARY}"
            )
        return self
