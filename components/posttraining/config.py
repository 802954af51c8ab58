"""The post-training stage's part of a recipe: ``PosttrainConfig(...)``; the nano values are the defaults."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.artifacts import StageConfig


class PosttrainConfig(StageConfig):
    """Everything that decides what stage ``posttrain`` writes."""

    seed: int = Field(20250728, ge=0, lt=1 << 63, description="seeds the split, the packing and the order")
    context: int = Field(
        512, ge=16, le=1 << 20, description="tokens of one packed row; longer dialogues are cut"
    )
    rows_per_step: int = Field(
        8, ge=1, le=1 << 16, description="packed rows of one optimizer step, all processes"
    )
    rows_per_micro_batch: int = Field(8, ge=1, le=4096, description="packed rows of one forward pass")
    epochs: float = Field(3.0, gt=0.0, le=100.0, description="passes over the training rows")
    max_steps: int = Field(
        220, ge=1, le=10_000_000, description="upper bound of optimizer steps, whatever the epochs"
    )
    peak_lr: float = Field(1.5e-3, gt=0.0, le=1.0, description="learning rate after warm-up")
    final_lr_ratio: float = Field(0.1, ge=0.0, le=1.0, description="last learning rate / peak")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="decay after warm-up")
    warmup_ratio: float = Field(0.05, ge=0.0, lt=1.0, description="share of the steps with linear warm-up")
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    eps: float = Field(1e-8, gt=0.0, le=1e-2)
    weight_decay: float = Field(
        0.01, ge=0.0, le=1.0, description="of matrices; norms and embeddings do not decay"
    )
    clip_norm: float = Field(1.0, gt=0.0, le=1e3, description="largest norm of the global gradient")
    weighting: Literal["token", "dialogue"] = Field(
        "dialogue", description="what counts the same in the loss: every assistant token, or every dialogue"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 computes in bfloat16 over fp32 weights"
    )
    load_balance_coef: float = Field(
        0.008, ge=0.0, le=1.0, description="weight of each layer's load-balance loss"
    )
    router_z_coef: float = Field(1e-3, ge=0.0, le=1.0, description="weight of each layer's router z-loss")
    gradient_checkpointing: bool = Field(False, description="recompute layers in the backward pass")
    heldout_percent: int = Field(5, ge=1, le=50, description="share of dialogues, by hash, never trained on")
    heldout_dialogues: int = Field(400, ge=1, le=100_000, description="held-out dialogues scored at most")
    kept_fractions: tuple[float, ...] = Field(
        (0.5,), max_length=16, description="points of the run, in (0, 1), whose weights are kept for merging"
    )
    task_items: int = Field(
        200, ge=10, le=100_000, description="items of every templated task that are scored"
    )
    tasks: tuple[str, ...] = Field(
        ("topic", "arithmetic"),
        min_length=1,
        max_length=32,
        description="evaluation sets scored before and after",
    )
    text_tokens_per_category: int = Field(
        2048,
        ge=64,
        description="held-out tokens per category scored in bits per byte, to see what SFT forgets",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    threads: int = Field(2, ge=1, le=512, description="CPU threads of the process")
    log_every_steps: int = Field(5, ge=1, le=10_000, description="steps between lines of metrics.jsonl")
    checkpoint_every_steps: int = Field(40, ge=1, description="steps between checkpoints to resume from")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rows_per_step % self.rows_per_micro_batch:
            raise ValueError(
                f"rows_per_step is {self.rows_per_step}; it must be a multiple of rows_per_micro_batch, "
                f"which is {self.rows_per_micro_batch}"
            )
        for fraction in self.kept_fractions:
            if not 0.0 < fraction < 1.0:
                raise ValueError(
                    f"kept_fractions holds {fraction}; every point must lie between 0 and 1, exclusive"
                )
        return self
