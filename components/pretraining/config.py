"""The pretraining stage's part of a recipe: ``PretrainConfig(...)``; the nano values are the defaults.

A value out of bounds names its field, the value and the allowed range. Values of the paper (arXiv 2507.20984)
and our own choices are told apart in ``components.pretraining.presets``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from components.artifacts import StageConfig
from components.corpus.categories import CATEGORIES

_Weight = Annotated[float, Field(ge=0.0, le=1.0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelPart(_Part):
    """Which model is trained: a named size and single values that differ from it."""

    preset: Literal["nano", "4b", "4b-hybrid", "21b"] = Field(
        default="nano", description="named size in model/"
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="official config keys that replace the preset's values"
    )

    @property
    def vocab_size(self) -> int:
        """The model's vocabulary, known without importing it."""
        size: int = self.overrides.get("vocab_size", 4096 if self.preset == "nano" else 151_936)
        return size


class TrainingStage(_Part):
    """One training stage: how many tokens, of what, at which context length and RoPE base."""

    tokens: int = Field(ge=1, description="training tokens; rounded up to whole optimizer steps")
    context: int = Field(ge=8, le=1 << 20, description="tokens of one training sequence")
    sequences_per_step: int = Field(ge=1, le=1 << 20, description="global batch in sequences")
    rope_theta: float = Field(ge=1e2, le=1e9, description="base of RoPE during this stage")
    mixture: dict[str, _Weight] = Field(description="share of sequences by category; sums to 1")

    @field_validator("mixture")
    @classmethod
    def _check_mixture(cls, mixture: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(mixture) - set(CATEGORIES))
        if unknown:
            raise ValueError(f"unknown category {', '.join(unknown)}; allowed are {', '.join(CATEGORIES)}")
        total = math.fsum(mixture.values())
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares sum to {total:.6g}; they must sum to 1")
        return {name: mixture.get(name, 0.0) for name in CATEGORIES}

    @property
    def steps(self) -> int:
        """Optimizer steps of the training stage."""
        return -(-self.tokens // (self.context * self.sequences_per_step))


class OptimizerPart(_Part):
    """AdamW, or Muon beside it; matrices of attention, router and experts decay, norms and the embeddings do not."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for the matrices of attention and experts, AdamW for the rest, at one learning rate",
    )
    muon_momentum: float = Field(default=0.95, ge=0.0, lt=1.0, description="momentum of Muon (Nesterov)")
    peak_lr: float = Field(default=6e-3, gt=0.0, le=1.0, description="learning rate after warm-up")
    schedule: Literal["cosine", "wsd"] = Field(
        default="cosine",
        description="after warm-up: one cosine, or the peak rate until the last decay_share of the run, then a decay",
    )
    decay_share: float = Field(
        default=0.2,
        gt=0.0,
        le=1.0,
        description="of schedule wsd: share of the run's steps, at its end, that decay",
    )
    decay_shape: Literal["linear", "1-sqrt"] = Field(
        default="1-sqrt", description="of schedule wsd: how the rate falls (1-sqrt: arXiv 2405.18392)"
    )
    final_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0, description="last learning rate / peak")
    warmup_steps: int = Field(default=60, ge=0, description="steps of linear warm-up; below the run's steps")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0, le=1e-2)
    weight_decay: float = Field(default=0.1, ge=0.0, le=1.0)
    clip_norm: float = Field(default=1.0, gt=0.0, le=1e3, description="largest norm of the global gradient")


class HardwarePart(_Part):
    """The machines that a recipe is meant for; plan and preflight compare them with what is there."""

    gpus: int = Field(default=0, ge=0, le=1 << 16, description="GPUs needed; 0: runs on whatever there is")
    gpu_memory_gb: float = Field(default=80.0, gt=0.0, description="memory of one GPU, in 10^9 bytes")
    peak_tflops: float = Field(default=989.0, gt=0.0, description="dense bf16 peak of one GPU, TFLOP/s")
    assumed_mfu: float = Field(
        default=0.3, gt=0.0, le=1.0, description="share of the peak that the plan counts on"
    )


class EvaluationPart(_Part):
    """Held-out evaluation in bits per byte, and the bigram baseline beside it."""

    tokens_per_category: int = Field(default=10_000, ge=64, description="held-out tokens scored per category")
    bigram_tokens_per_category: int = Field(
        default=20_000_000,
        ge=1000,
        description="training tokens per category that the bigram baseline counts",
    )
    sequences_per_batch: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="windows in one forward pass, at the first training stage's context; of longer ones fewer",
    )
    position_documents: int = Field(
        default=48,
        ge=0,
        le=100_000,
        description="held-out documents per category on which the last stage's longer context is judged by position; "
        "0: not",
    )


class BranchPart(_Part):
    """Another run's checkpoint at which this run begins."""

    checkpoint: str = Field(min_length=1, description="its folder, step-…")
    identity: str = Field(
        pattern="^[0-9a-f]{64}$", description="SHA-256 over its checksums, which it must still have"
    )


class PretrainConfig(StageConfig):
    """Everything that decides the weights that stage ``pretrain`` writes. Defaults are the nano recipe.

    The fields in ``PLACEMENT`` say where a run computes, how its progress is saved and when it stops. Its results do
    not depend on them but for rounding, so they can be changed between two starts of the same run.
    """

    PLACEMENT: ClassVar[frozenset[str]] = frozenset(
        {
            # Where and how it is computed: the order of summation changes, and with it rounding; running (not exact)
            # counts of the load-balance loss cover other micro-steps.
            "processes",
            "threads",
            "device",
            "hardware",
            "expert_parallel",
            "zero_stage",
            "sequences_per_micro_batch",
            "loss_chunk_tokens",
            "compile_layers",
            "activation_checkpointing",
            "recompute_every",
            # How progress is kept.
            "checkpoint_every_steps",
            "keep_checkpoints",
            "seal_in_background",
            "save_grace_s",
            # When a run that stands still is given up, and what is kept to find out why.
            "hang_timeout_s",
            "pause_timeout_s",
            "nccl_trace_events",
            # What a loss spike leads to: a run without one is the same under every policy; skipped steps are noted.
            "spike_ratio",
            "grad_spike_ratio",
            "on_spike",
            "max_skips",
            "max_skips_per_1000",
            "rewind_steps",
            "max_rewinds",
            # What is said about the run.
            "dead_expert_share",
            "dead_expert_intervals",
        }
    )

    seed: int = Field(default=20250728, ge=0, lt=1 << 63, description="seeds initial weights and data order")
    branch: BranchPart | None = Field(
        default=None,
        description="begin with weights and moments of another run's checkpoint, not with fresh ones; "
        "python -m components.pretraining.studies.anneal makes such configs",
    )
    model: ModelPart = Field(default_factory=ModelPart)
    stages: tuple[TrainingStage, ...] = Field(
        min_length=3, max_length=3, default_factory=lambda: _NANO_STAGES
    )
    optimizer: OptimizerPart = Field(default_factory=OptimizerPart)
    evaluation: EvaluationPart = Field(default_factory=EvaluationPart)
    load_balance_coef: float = Field(
        default=0.032, ge=0.0, le=1.0, description="weight of each layer's load-balance loss"
    )
    load_balance_groups: int = Field(
        default=1,
        ge=1,
        le=1 << 16,
        description="parts of the global batch, each of which pools its expert counts for the load-balance loss",
    )
    load_balance_domains: Literal["mixed", "sharded"] = Field(
        default="mixed",
        description="mixed: every group sees the whole mixture; sharded: rows are dealt to groups by category",
    )
    load_balance_counts: Literal["running", "exact"] = Field(
        default="running",
        description="running: counts of the micro-steps so far; exact: of the whole group, by a first forward pass",
    )
    load_balance_bias_rate: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="step of a bias on the routers' choice that balances without a loss (DeepSeek-V3: 0.001, with "
        "load_balance_coef 0 or small); 0: no bias. Exports know none, so it fades at the end of the run",
    )
    load_balance_bias_fade: float = Field(
        default=0.1,
        gt=0.0,
        le=1.0,
        description="share of the run's steps, at its end, over which that bias fades to 0",
    )
    router_dtype: Literal["model", "fp32"] = Field(
        default="model",
        description="of the router's logits: as the weights, or fp32 also where these are bf16",
    )
    router_z_coef: float = Field(
        default=4e-3, ge=0.0, le=1.0, description="weight of each layer's router z-loss"
    )
    absent_category: Literal["error", "renormalise"] = Field(
        default="renormalise", description="what to do when the shards lack a category that a mixture wants"
    )
    sequences_per_micro_batch: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="at most so many sequences in one forward pass of one process, at the first stage's context",
    )
    hardware: HardwarePart = Field(default_factory=HardwarePart)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="bf16 keeps fp32 master weights; auto: bf16 where the hardware multiplies it, else fp32",
    )
    export_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="dtype of the exported weights, rounded from the fp32 master weights"
    )
    zero_stage: Literal[1, 2] = Field(
        default=1,
        description="DeepSpeed ZeRO: 1 partitions the optimizer's state over processes and sends gradients once a "
        "step; 2 partitions the gradients too, which saves memory, and sends them at every micro-step",
    )
    expert_parallel: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="neighbouring processes that share one copy of the experts; divides processes and experts",
    )
    loss_chunk_tokens: int = Field(
        default=256, ge=1, le=1 << 20, description="positions whose logits are held at once"
    )
    compile_layers: bool = Field(
        default=False,
        description="compile attention and norms of each layer (torch.compile), not the experts",
    )
    activation_checkpointing: bool = Field(default=False, description="recompute layers in the backward pass")
    recompute_every: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="with activation_checkpointing, only every n-th layer is recomputed; the others keep their "
        "activations: less work, more memory",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where there is one"
    )
    processes: int = Field(
        default=1, ge=1, le=64, description="processes on this machine; more than 1 go through torchrun"
    )
    threads: int = Field(default=1, ge=1, le=512, description="CPU threads of each process")
    log_every_steps: int = Field(
        default=10, ge=1, le=10_000, description="steps between lines of metrics.jsonl"
    )
    checkpoint_every_steps: int = Field(
        default=200, ge=1, description="steps between checkpoints; each stage ends with one"
    )
    keep_checkpoints: int = Field(default=2, ge=1, le=100, description="newest checkpoints kept")
    seal_in_background: bool = Field(
        default=True,
        description="checksum and flush a checkpoint while training goes on; false: training waits for it",
    )
    save_grace_s: int = Field(
        default=60,
        ge=1,
        le=86_400,
        description="seconds that a run may take after SIGTERM to finish its step, save and seal",
    )
    hang_timeout_s: int = Field(
        default=300,
        ge=0,
        le=86_400,
        description="seconds without progress within a training step after which a run of several processes prints "
        "their stacks and ends, to be started again; below NCCL's 600; 0: never, whatever the run does",
    )
    pause_timeout_s: int = Field(
        default=7200,
        ge=1,
        le=604_800,
        description="the same outside training steps: start, first step, evaluation, export. A save has save_grace_s",
    )
    nccl_trace_events: int = Field(
        default=2000,
        ge=0,
        le=1_000_000,
        description="collectives of each process that NCCL's flight recorder keeps and writes when one hangs; 0: none",
    )
    spike_ratio: float = Field(
        default=1.75,
        gt=1.0,
        le=100.0,
        description="a loss above this multiple of the recent median is a spike",
    )
    grad_spike_ratio: float = Field(
        default=10.0,
        gt=1.0,
        le=1e6,
        description="a gradient norm, before clipping, above this multiple of the recent median is a spike",
    )
    on_spike: Literal["stop", "skip", "rewind"] = Field(
        default="stop",
        description="what a spike, or a loss or gradient that is not finite, leads to: stop the run, skip the step, or "
        "go back to an earlier checkpoint and pass over the batches around it",
    )
    max_skips: int = Field(
        default=10,
        ge=1,
        le=10_000,
        description="steps skipped in a row after which the run stops all the same",
    )
    max_skips_per_1000: int = Field(
        default=50,
        ge=1,
        le=1000,
        description="steps skipped among the last 1,000 after which the run stops all the same",
    )
    rewind_steps: int = Field(
        default=100,
        ge=1,
        le=100_000,
        description="steps before and after a spike whose batches on_spike = rewind passes over",
    )
    max_rewinds: int = Field(
        default=10, ge=1, le=1000, description="rewinds of a run after which a spike stops it all the same"
    )

    dead_expert_share: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="share of its layer's mean load below which an expert counts as dead",
    )
    dead_expert_intervals: int = Field(
        default=10,
        ge=1,
        le=10_000,
        description="logged intervals in a row that an expert is dead before an alarm is raised",
    )

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _check_zero_stage(cls, stage: Any) -> Any:
        if stage == 3:
            raise ValueError(
                "ZeRO-3 is not supported, since the loss in chunks and the export read whole parameters; allowed are 1 "
                "and 2, and expert_parallel is what spreads the weights"
            )
        return stage

    @model_validator(mode="after")
    def _check_schedule(self) -> PretrainConfig:
        steps = self.total_steps
        if self.optimizer.warmup_steps >= steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; the run has {steps} steps, "
                f"so 0 to {steps - 1} are allowed"
            )
        part = self.optimizer
        if part.schedule == "wsd" and part.warmup_steps + round(part.decay_share * steps) > steps:
            raise ValueError(
                f"optimizer.decay_share is {part.decay_share:g}, {round(part.decay_share * steps)} of the run's "
                f"{steps} steps, after {part.warmup_steps} of warm-up; at most "
                f"{(steps - part.warmup_steps) / steps:.6g} is allowed"
            )
        for number, stage in enumerate(self.stages):
            if self.load_balance_groups > stage.sequences_per_step:
                raise ValueError(
                    f"load_balance_groups is {self.load_balance_groups}; stages[{number}] has "
                    f"{stage.sequences_per_step} sequences a step, so 1 to {stage.sequences_per_step} are allowed"
                )
        return self

    def micro_batch(self, stage: int) -> int:
        """Most sequences per forward pass in a training stage (0-based): as many tokens as in the first, at least 1."""
        tokens = self.sequences_per_micro_batch * self.stages[0].context
        return max(1, min(tokens // self.stages[stage].context, self.stages[stage].sequences_per_step))

    def recomputed_layers(self, layers: int) -> int:
        """How many of ``layers`` the backward pass recomputes."""
        return -(-layers // self.recompute_every) if self.activation_checkpointing else 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all training stages together."""
        return sum(stage.steps for stage in self.stages)


_NANO_STAGES: tuple[TrainingStage, ...] = (
    TrainingStage(
        tokens=1_500_000,
        context=256,
        sequences_per_step=8,
        rope_theta=1e5,
        mixture={"general": 0.45, "maths": 0.15, "code": 0.15, "web_stem": 0.15, "chinese": 0.10},
    ),
    TrainingStage(
        tokens=1_100_000,
        context=256,
        sequences_per_step=8,
        rope_theta=1e5,
        mixture={"general": 0.30, "maths": 0.20, "code": 0.20, "web_stem": 0.20, "chinese": 0.10},
    ),
    TrainingStage(
        tokens=900_000,
        context=512,
        sequences_per_step=4,
        rope_theta=1.5e6,
        mixture={
            "general": 0.25,
            "maths": 0.20,
            "code": 0.15,
            "web_stem": 0.15,
            "chinese": 0.10,
            "sft": 0.15,
        },
    ),
)
