"""What a run will cost and what it lacks, before anything is spent: ``python -m flows.pretrain --recipe 21b --plan``.

``estimate_run(...)`` counts parameters, memory per GPU by part, tokens, FLOPs and days;
``preflight(config)`` lists what this machine lacks (the runner asks it before it starts any stage).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.artifacts import StageError
from components.pretraining.config import HardwarePart, PretrainConfig
from components.pretraining.data.accumulation import BatchCut
from components.pretraining.data.curriculum import Curriculum
from components.pretraining.launcher import node_count

if TYPE_CHECKING:
    from model import SmallThinkerConfig

_GB = 1e9
_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default reduce bucket, in elements
_IMBALANCE = 2.0  # [ours] rows of the fullest rank over the mean, where experts lie on several ranks
_RESERVE_BYTES = 4e9  # CUDA context, NCCL buffers and fragmentation: our allowance


@dataclass(frozen=True)
class TrainingStageEstimate:
    """One training stage in numbers."""

    name: str
    tokens: float
    context: int
    steps: int
    tokens_per_step: int
    micro_batch: int
    accumulation: int
    padding: float
    flops_per_token: float
    days: float


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes, in numbers; ``render()`` is the plan that users read.

    Attributes:
        gpus: processes counted on, one per GPU.
        expert_parallel: of them, those that share one copy of the experts.
        parameters, active: all parameters, and those that act on a token without the vocabulary's matrices.
        memory_bytes: of one process, by part.
        memory_limit_bytes: of one GPU.
        stages: per training stage.
        flops: of the whole run.
        days: of the whole run at ``mfu``; the all-to-all of expert parallelism is not counted.
        exchanged_bytes: that a process sends per token in all-to-alls, over all layers and passes.
    """

    model: str
    gpus: int
    expert_parallel: int
    zero_stage: int
    precision: str
    parameters: int
    active: int
    memory_bytes: dict[str, float]
    memory_limit_bytes: float
    stages: tuple[TrainingStageEstimate, ...]
    flops: float
    days: float
    exchanged_bytes: float
    mfu: float
    peak_tflops: float
    kept_checkpoints: int
    problems: tuple[str, ...]

    @property
    def tokens(self) -> float:
        """Training tokens of all training stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def checkpoint_bytes(self) -> float:
        """Size of a checkpoint: weights in the working dtype, fp32 master weights and two moments."""
        return self.parameters * (12.0 + (4 if self.precision == "fp32" else 2))

    def render(self) -> str:
        """The plan as text, one fact per line."""
        total = sum(self.memory_bytes.values())
        lines = [
            f"model       {self.model}: {self.parameters:,} parameters, {self.active:,} active per token "
            "(vocabulary matrices apart)",
            f"mesh        {self.gpus} processes, each expert on {self.gpus // self.expert_parallel} of them "
            f"(expert parallelism {self.expert_parallel}), everything else on all; ZeRO-{self.zero_stage}, "
            f"{self.precision}",
            f"memory      {total / _GB:.1f} GB of {self.memory_limit_bytes / _GB:.0f} GB per GPU",
            *(f"  {name:<26}{size / _GB:8.2f} GB" for name, size in self.memory_bytes.items()),
            f"checkpoint  {self.checkpoint_bytes / _GB:,.0f} GB each, {self.kept_checkpoints} kept",
            f"tokens      {self.tokens:.4g} in {sum(s.steps for s in self.stages):,} steps",
        ]
        for stage in self.stages:
            lines.append(
                f"  {stage.name}: {stage.tokens:.4g} tokens, context {stage.context:,}, {stage.steps:,} steps of "
                f"{stage.tokens_per_step:,} tokens ({stage.micro_batch} sequences x {stage.accumulation} micro-steps "
                f"per process{f', {stage.padding:.1%} of it padding' if stage.padding else ''}), "
                f"{stage.flops_per_token:.3e} FLOPs per token, {stage.days:.1f} days"
            )
        lines.append(
            f"compute     {self.flops:.3g} FLOPs (recomputation not counted); "
            f"{self.days:.1f} days at {self.mfu:.0%} of {self.peak_tflops:g} TFLOP/s on {self.gpus} GPUs"
        )
        if self.exchanged_bytes and self.days:
            rate = self.exchanged_bytes * self.tokens / (self.days * 86_400 * self.gpus)
            lines.append(
                f"all-to-all  {self.exchanged_bytes / 1e6:.1f} MB sent per token, {rate / _GB:.0f} GB/s per GPU at "
                "that speed; its time is not counted"
            )
        lines += [f"problem     {problem}" for problem in self.problems]
        return "\n".join(lines)


def exchanged_bytes_per_token(model: SmallThinkerConfig, config: PretrainConfig) -> float:
    """Bytes per token that leave a process: rows to their experts and back, forward, backward and recomputed."""
    elsewhere = 1.0 - 1.0 / config.expert_parallel
    passes = 4 + 2 * config.recomputed_layers(model.num_hidden_layers) / model.num_hidden_layers
    width_bytes = 4 if config.precision == "fp32" else 2
    row_bytes = model.hidden_size * width_bytes
    return elsewhere * passes * model.moe_num_active_primary_experts * row_bytes * model.num_hidden_layers


def memory_by_part(model: SmallThinkerConfig, config: PretrainConfig, processes: int) -> dict[str, float]:
    """Estimated bytes per process and part, at the training stage that needs most.

    A process holds its part of the experts and all other weights. Weights in the working dtype, fp32 master weights
    and two Adam moments sharded: the experts' over the processes that hold the same ones, all others over all
    processes. Gradients are summed in fp32: whole with ZeRO-1, beside the process's part of their mean or the largest
    tensor's on its way; sharded with ZeRO-2, beside the reduce buckets. Activations: a recomputed layer keeps its
    residual stream, any other what its backward pass needs; beside them one layer's whole working set. The head holds
    its logits and their gradient. Compared with allocations by ``components.pretraining.dry_run``, see
    docs/pretraining.md.

    Args:
        model: the architecture.
        config: the recipe's part.
        processes: of the run.
    """
    from model.accounting import count_parameters

    width_bytes = 4 if config.precision == "fp32" else 2
    size = config.expert_parallel
    counts = count_parameters(model)
    local_experts = counts.experts / size
    dense = counts.total - counts.experts
    held = dense + local_experts
    sharded = dense / max(1, processes) + local_experts / max(1.0, processes / size)
    tokens = max(config.micro_batch(i) * stage.context for i, stage in enumerate(config.stages))
    buckets = min(held, _BUCKET_ELEMENTS) * (
        2.0 * width_bytes + 4.0
    )  # ZeRO-2: two, and a copy that travels in fp32
    table = float(model.vocab_size * model.hidden_size)
    gate_up = local_experts / model.num_hidden_layers * 2 / 3  # one layer's
    if config.zero_stage == 1:
        # Sums of whole gradients; then either one tensor's on its way there, or this process's part of their mean.
        gradients = held * 4.0 + max(max(table, gate_up) * width_bytes, sharded * 4.0)
    elif width_bytes == 2:
        # The fp32 sums over micro-steps, and the one tensor that is being added to them.
        gradients = (sharded + min(sharded, max(table, gate_up))) * 4.0 + buckets
    else:
        # DeepSpeed keeps a whole tensor wherever the partition overlaps it.
        gradients = min(held, sharded + table + gate_up) * width_bytes + buckets
    heads = model.num_attention_heads * model.head_dim
    imbalance = 1.0 if size == 1 else min(float(size), _IMBALANCE)
    rows = tokens * model.moe_num_active_primary_experts
    routed_bytes = imbalance * rows * (2 * model.hidden_size + 4 * model.moe_ffn_hidden_size) * width_bytes
    exchange_bytes = 0.0 if size == 1 else 2.0 * rows * model.hidden_size * width_bytes
    layer_bytes = tokens * (6 * model.hidden_size + 4 * heads) * width_bytes + routed_bytes
    # What a layer saves for its backward pass; its other activations are freed at once.
    saved_bytes = 3.0 * tokens * (model.hidden_size + heads) * width_bytes
    saved_bytes += imbalance * rows * (2 * model.hidden_size + 3 * model.moe_ffn_hidden_size) * width_bytes
    layers = model.num_hidden_layers
    recomputed = config.recomputed_layers(layers)
    residual_bytes = tokens * model.hidden_size * width_bytes * recomputed
    # Logits and their gradient; between them nothing is written on GPUs, and an fp32 copy of bf16 on CPUs.
    copies_bytes = 2 * width_bytes + (4 if width_bytes == 2 and not config.hardware.gpus else 0)
    logits = min(tokens, config.loss_chunk_tokens) * model.vocab_size * copies_bytes
    logits += model.vocab_size * model.hidden_size * 4  # the output matrix's gradient is gathered in fp32
    # One layer's whole working set: it is one of those that keep their activations, or one that is recomputed.
    activations = residual_bytes + saved_bytes * max(0, layers - max(1, recomputed)) + layer_bytes
    parts = {
        "weights": float(held * width_bytes),
        "gradients": float(gradients),
        "master weights and moments": sharded * (12.0 if width_bytes == 2 else 8.0),
        "activations": float(activations),
        "logits and their gradient": float(logits),
    }
    if size > 1:
        parts["all-to-all buffers"] = exchange_bytes * max(1, layers - recomputed)
    # In the optimizer step activations are freed, and ZeRO-2 in fp32 copies the sharded gradients into one tensor.
    step_bytes = sharded * 4.0 if config.zero_stage >= 2 and width_bytes == 4 else 0.0
    if step_bytes > activations + logits:
        parts["optimizer step, beyond"] = step_bytes - activations - logits
    if config.hardware.gpus:
        parts["CUDA, NCCL, fragmentation"] = _RESERVE_BYTES
    return parts


def estimate_run(
    model: SmallThinkerConfig, config: PretrainConfig, hardware: HardwarePart | None = None
) -> RunEstimate:
    """Estimate memory, FLOPs and days of a run.

    Args:
        model: the architecture.
        config: the recipe's part.
        hardware: replaces the recipe's.
    """
    from components.pretraining.processes.ranks import Ranks
    from model.accounting import count_parameters, training_flops_per_token

    hardware = hardware or config.hardware
    processes = hardware.gpus or config.processes
    counts = count_parameters(model)
    memory = memory_by_part(model, config, processes)
    limit = hardware.gpu_memory_gb * _GB
    problems: list[str] = []
    try:
        Ranks(world=processes, expert_parallel=config.expert_parallel).check_experts(
            model.moe_num_primary_experts
        )
    except StageError as error:
        problems.append(str(error).rstrip("."))
    stages = []
    for span in Curriculum(config).spans:
        stage = span.stage
        try:
            cut = BatchCut.of(config, span.index, processes)
        except StageError as error:
            problems.append(str(error).rstrip("."))
            cut = BatchCut.of(config, span.index, stage.sequences_per_step)
        tokens = float(stage.steps * stage.context * stage.sequences_per_step)
        flops = training_flops_per_token(model, stage.context)
        speed = max(1, hardware.gpus) * hardware.peak_tflops * 1e12 * hardware.assumed_mfu
        stages.append(
            TrainingStageEstimate(
                name=span.name,
                tokens=tokens,
                context=stage.context,
                steps=stage.steps,
                tokens_per_step=stage.context * stage.sequences_per_step,
                micro_batch=cut.micro_batch,
                accumulation=cut.micro_steps,
                padding=1.0 - stage.sequences_per_step / cut.computed_rows,
                flops_per_token=flops,
                days=tokens * flops / speed / 86_400,
            )
        )
    needed = sum(memory.values())
    if hardware.gpus and needed > limit:
        problems.append(f"{needed / _GB:.0f} GB per GPU are needed and {limit / _GB:.0f} GB are there")
    return RunEstimate(
        model=config.model.preset,
        gpus=processes,
        expert_parallel=config.expert_parallel,
        zero_stage=config.zero_stage,
        precision=config.precision,
        parameters=counts.total,
        active=counts.active,
        memory_bytes=memory,
        memory_limit_bytes=limit,
        stages=tuple(stages),
        flops=sum(stage.tokens * stage.flops_per_token for stage in stages),
        days=sum(stage.days for stage in stages),
        exchanged_bytes=exchanged_bytes_per_token(model, config),
        mfu=hardware.assumed_mfu,
        peak_tflops=hardware.peak_tflops,
        kept_checkpoints=config.keep_checkpoints,
        problems=tuple(problems),
    )


def gpus_here(environment: Mapping[str, str]) -> tuple[int, float]:
    """CUDA devices of this machine times the nodes of the run, and the smallest one's memory in bytes."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = min((float(torch.cuda.get_device_properties(i).total_memory) for i in range(count)), default=0.0)
    return count * node_count(environment), memory


def preflight(config: PretrainConfig) -> list[str]:
    """One sentence per thing that this machine lacks for ``config``; empty when it can start."""
    problems: list[str] = []
    for module in ("torch", "deepspeed", "transformers", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            problems.append(
                f"the Python package {module} is missing; install the extra: pip install 'smallthinker[pipeline]'"
            )
    if problems:
        return problems
    hardware = config.hardware
    if not hardware.gpus and config.device != "cuda":
        return []  # torch takes seconds to import
    found, memory = gpus_here(os.environ)
    if hardware.gpus > found:
        problems.append(
            f"needs {hardware.gpus} GPUs with {hardware.gpu_memory_gb:g} GB; found {found} "
            "(start it inside an allocation: infra/slurm, infra/kubernetes)"
        )
    elif hardware.gpus and memory < 0.95 * hardware.gpu_memory_gb * _GB:
        problems.append(
            f"needs GPUs with {hardware.gpu_memory_gb:g} GB; the smallest here has {memory / _GB:.0f} GB"
        )
    elif config.device == "cuda" and not found:
        problems.append("device is cuda and torch finds no CUDA device; set pretrain.device=auto")
    if hardware.gpus:
        from components.pretraining.architecture import model_config

        problems += estimate_run(model_config(config), config).problems
    return problems


def describe(config: PretrainConfig) -> str:
    """The plan of a recipe's part as text.

    Raises:
        StageError: the model's overrides are impossible.
    """
    from components.pretraining.architecture import model_config

    return estimate_run(model_config(config), config).render()


def describe_on_gpus(config: PretrainConfig) -> str:
    """The plan of a recipe that asks for GPUs; empty for one that runs on whatever there is."""
    return describe(config) if config.hardware.gpus else ""
