"""The DeepSpeed engine around the model: ``engine = build_engine(model, config, ranks)``.

DeepSpeed 0.19.8. The optimizer is torch's own fused AdamW handed over by us, so that no DeepSpeed operator has to be
compiled at run time; ZeRO then partitions its state.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from components.artifacts import StageError
from components.pretraining.config import OptimizerPart, PretrainConfig
from components.pretraining.data.accumulation import BatchCut
from components.pretraining.deepspeed.gradients import GradientSums
from components.pretraining.deepspeed.muon import MuonAdamW
from components.pretraining.processes.ranks import Ranks
from components.weights.optimizer import parameter_groups

if TYPE_CHECKING:
    from model import SmallThinkerForCausalLM


_UNIVERSAL = {"universal_checkpoint_version": 0.4}


def deepspeed_config(config: PretrainConfig, world: int, precision: str) -> dict[str, Any]:
    """DeepSpeed's own config for ``world`` processes at the first training stage.

    Gradients travel in fp32. With ZeRO-1 :class:`GradientSums` sums and reduces them, so DeepSpeed gets no bucket; with
    ZeRO-2 it sums its part over micro-steps in fp32. Batch sizes include the padding of an uneven cut.
    """
    cut = BatchCut.of(config, 0, world)
    partitioned = config.zero_stage >= 2
    return {
        "train_batch_size": cut.computed_rows,
        "train_micro_batch_size_per_gpu": cut.micro_batch,
        "gradient_accumulation_steps": cut.micro_steps,
        "gradient_clipping": config.optimizer.clip_norm,
        "communication_data_type": "fp32",
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"} if partitioned or precision == "fp32" else {},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": partitioned and world > 1 and config.device == "cuda",
            "contiguous_gradients": True,
            **({} if partitioned else {"reduce_bucket_size": 1}),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def build_optimizer(model: torch.nn.Module, part: OptimizerPart) -> torch.optim.AdamW:
    """torch's fused AdamW over :func:`parameter_groups`, with Muon for the matrices if ``part`` says so."""
    adamw: dict[str, Any] = {
        "lr": part.peak_lr,
        "betas": (part.beta1, part.beta2),
        "eps": part.eps,
        "fused": True,
    }
    groups = parameter_groups(model, part.weight_decay, part.kind == "muon")
    if part.kind == "muon":
        return MuonAdamW(groups, part.muon_momentum, **adamw)
    return torch.optim.AdamW(groups, **adamw)


def _quieten() -> None:
    """DeepSpeed logs each step of its set-up at INFO; only warnings concern the user."""
    from deepspeed.utils import logger  # type: ignore[import-untyped]

    logger.setLevel(logging.WARNING)


def compile_layers(model: SmallThinkerForCausalLM) -> None:
    """Compile attention and norms of every layer in place: all have the same shapes, so each compiles once."""
    from model.compiling import compile_module

    for layer in model.model.layers:
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm"):
            compile_module(layer.get_submodule(name))


def prepare_model(model: SmallThinkerForCausalLM, config: PretrainConfig, ranks: Ranks) -> None:
    """Give the model its load-balance group, recomputation and compiled layers, as ``config`` asks."""
    from model import LoadBalance
    from model.compiling import refuse_fallbacks

    refuse_fallbacks()
    model.balance = LoadBalance(_balance_group(config, ranks))
    model.set_router_fp32(config.router_dtype == "fp32")
    if config.activation_checkpointing:
        # Nothing in a layer is random, so no RNG state has to be kept for the recomputation.
        keep = {"use_reentrant": False, "preserve_rng_state": False}
        model.activation_checkpointing_enable(keep, config.recompute_every)
    if config.compile_layers:
        compile_layers(model)


def build_engine(model: SmallThinkerForCausalLM, config: PretrainConfig, ranks: Ranks) -> Any:
    """Wrap the model into a DeepSpeed engine with its optimizer.

    Args:
        model: on its device, its experts sharded where ``config`` asks for expert parallelism.
        config: the recipe's part.
        ranks: this process's place.

    Returns:
        ``deepspeed.DeepSpeedEngine``.

    Raises:
        StageError: a training stage has fewer sequences than there are ranks.
    """
    for stage in range(len(config.stages)):  # now, and not weeks later when the stage begins
        BatchCut.of(config, stage, ranks.world)
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed  # type: ignore[import-untyped]

    _quieten()
    # DeepSpeed's shared-memory collectives serve inference only and cost a minute of g++ at first use; gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    prepare_model(model, config, ranks)
    optimizer = build_optimizer(model, config.optimizer)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, ranks.world, ranks.precision),
        dist_init_required=False if deepspeed.comm.is_initialized() else None,
    )
    if config.zero_stage == 1:
        GradientSums(engine)
    if isinstance(optimizer, MuonAdamW):
        optimizer.attach(engine.optimizer)
    return engine


def _balance_group(config: PretrainConfig, ranks: Ranks) -> dist.ProcessGroup | None:
    """The ranks with which this one shares load-balance groups; ``None`` alone."""
    size = BatchCut.of(config, 0, ranks.world).sharing
    if size == 1:
        return None
    if size == ranks.world:
        return dist.group.WORLD
    mine = None
    for first in range(0, ranks.world, size):
        members = list(range(first, first + size))
        group = dist.new_group(members)
        if ranks.rank in members:
            mine = group
    return mine


def enter_training_stage(engine: Any, config: PretrainConfig, stage: int, world: int) -> None:
    """Set the batch size of the engine and the RoPE base of the model to those of a training stage (0-based)."""
    cut = BatchCut.of(config, stage, world)
    engine.set_train_micro_batch_size(cut.micro_batch)
    engine.set_train_batch_size(cut.computed_rows)
    engine.module.config.rope_theta = config.stages[stage].rope_theta


def save_engine(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write weights, optimizer and ``state`` into ``folder`` (a collective)."""
    # DeepSpeed's converter needs it; ours says that no parameter has a partitioning rule of its own.
    engine.module.universal_checkpoint_info = _UNIVERSAL
    engine.save_checkpoint(
        str(folder.parent), tag=folder.name, client_state={"trainer": state}, save_latest=False
    )


def load_engine(engine: Any, folder: Path) -> dict[str, Any]:
    """Restore what :func:`save_engine` wrote; returns ``state``."""
    path, client = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise StageError(f"DeepSpeed could not load the checkpoint {folder}.")
    state: dict[str, Any] = client["trainer"]
    return state
