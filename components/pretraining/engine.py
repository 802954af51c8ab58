"""The DeepSpeed engine around the model: ``engine = build_engine(model, config, ranks)``.

DeepSpeed 0.19.8. The optimizer is torch's own fused AdamW handed over by us, so that no DeepSpeed operator has to be
compiled at run time; ZeRO then partitions its state.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from components.artifacts import StageError
from components.pretraining.config import OptimizerPart, PretrainConfig
from components.pretraining.mesh import Mesh, accumulation_steps

if TYPE_CHECKING:
    from model import SmallThinkerForCausalLM


_UNIVERSAL = {"universal_checkpoint_version": 0.4}


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of the run, the device it drives, and its precision (fp32 or bf16)."""

    rank: int
    world: int
    device: torch.device
    precision: str = "fp32"

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype of weights and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def mesh(self, config: PretrainConfig) -> Mesh:
        """This process's place in the mesh that ``config`` asks for."""
        return Mesh(self.rank, self.world, config.expert_parallel)


def choose_device(config: PretrainConfig) -> str:
    """``cuda`` or ``cpu`` as the config asks.

    Raises:
        StageError: ``cuda`` is asked for and there is none.
    """
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise StageError("device is cuda, but torch finds no CUDA device here; use auto or cpu.")
    return config.device


def choose_precision(config: PretrainConfig, device: str) -> str:
    """``bf16`` or ``fp32``; ``auto`` takes bf16 where there are instructions for it, since others emulate it."""
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def join_processes(config: PretrainConfig) -> Ranks:
    """Join torch's process group: torchrun's when its environment is there, else one of this process alone.

    A process that joined before keeps its group, so that several runs can follow one another.
    """
    kind = choose_device(config)
    os.environ.setdefault("DS_ACCELERATOR", kind)
    if "RANK" not in os.environ:
        # DeepSpeed looks for these and would otherwise go searching for MPI.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    torch.set_num_threads(config.threads)
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        if world == 1:
            # A store in memory: no port, no host name, nothing that a laptop without network could lack.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    return Ranks(rank, world, device, choose_precision(config, kind))


def deepspeed_config(config: PretrainConfig, world: int, precision: str) -> dict[str, Any]:
    """DeepSpeed's own config for ``world`` processes at the first stage.

    Gradients of micro-steps are summed in fp32, but for bf16 with ZeRO-1: there the setting makes DeepSpeed 0.19.8 take
    another optimizer class, whose checkpoints, norms and dropped steps are not those that this package knows.
    """
    micro = config.micro_batch(0)
    sums = {"grad_accum_dtype": "fp32"} if config.zero_stage >= 2 or precision == "fp32" else {}
    return {
        "train_batch_size": config.stages[0].sequences_per_step,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation_steps(config, 0, world),
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": sums,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": world > 1 and config.device == "cuda",
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of attention, router and experts decay; norms, embeddings and the output matrix do not.

    Decay bounds the scale of matrices whose output is normalised. An embedding row of a rare token gets gradients
    seldom, and decay would shrink it in between. Experts of which this rank holds a part form groups of their own:
    ZeRO partitions them over fewer ranks.
    """
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_table = "embed_tokens" in name or "lm_head" in name
        (free if parameter.ndim < 2 or is_table else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": free, "weight_decay": 0.0, "name": "free"},
    ]
    if any(not getattr(parameter, "allreduce", True) for parameter in decayed):
        from deepspeed.moe.utils import (  # type: ignore[import-untyped]
            split_params_into_different_moe_groups_for_optimizer,
        )

        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    return groups


def build_optimizer(model: torch.nn.Module, part: OptimizerPart) -> torch.optim.AdamW:
    """torch's fused AdamW over :func:`parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, part.weight_decay),
        lr=part.peak_lr,
        betas=(part.beta1, part.beta2),
        eps=part.eps,
        fused=True,
    )


def _quieten() -> None:
    """DeepSpeed reports each step of its set-up at INFO; keep what concerns the user."""
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

    model.balance = LoadBalance(_balance_group(config, ranks))
    if config.activation_checkpointing:
        # Nothing in a layer is random, so no generator's state has to be kept for the recomputation.
        keep = {"use_reentrant": False, "preserve_rng_state": False}
        model.activation_checkpointing_enable(keep, config.recompute_every)
    if config.compile_layers:
        compile_layers(model)


def build_engine(model: SmallThinkerForCausalLM, config: PretrainConfig, ranks: Ranks) -> Any:
    """Wrap the model into a DeepSpeed engine with AdamW.

    Args:
        model: on its device, its experts sharded where ``config`` asks for expert parallelism.
        config: the recipe's part.
        ranks: this process's place.

    Returns:
        ``deepspeed.DeepSpeedEngine``.
    """
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed  # type: ignore[import-untyped]

    _quieten()
    # The shared-memory operator serves inference only and costs a minute of g++ at first use: gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    prepare_model(model, config, ranks)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        config=deepspeed_config(config, ranks.world, ranks.precision),
        dist_init_required=False if deepspeed.comm.is_initialized() else None,
    )
    return engine


def _balance_group(config: PretrainConfig, ranks: Ranks) -> dist.ProcessGroup | None:
    """The ranks with which this one shares a load-balance group; ``None`` alone."""
    accumulation_steps(config, 0, ranks.world)
    size = ranks.world // config.load_balance_groups
    if size <= 1:
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


def enter_stage(engine: Any, config: PretrainConfig, stage: int, world: int) -> None:
    """Give the engine a stage's batch size and the model its RoPE base."""
    micro = config.micro_batch(stage)
    accumulation_steps(config, stage, world)
    engine.set_train_micro_batch_size(micro)
    engine.set_train_batch_size(config.stages[stage].sequences_per_step)
    engine.module.config.rope_theta = config.stages[stage].rope_theta


def save_engine(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write weights, optimizer and ``state`` into ``folder`` (every rank takes part)."""
    # DeepSpeed's converter asks for it; it says that no parameter needs a rule of its own.
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
