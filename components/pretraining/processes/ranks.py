"""This process's place among those of a run: ``ranks = join_processes(config)``.

The mesh is data x expert: neighbouring ranks share one copy of the experts, everything else is data parallel over all
ranks. With 8 ranks and ``expert_parallel`` 4, ranks 0-3 and 4-7 hold one copy each, and ranks 1 and 5 the same experts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from components.artifacts import StageError
from components.pretraining.config import PretrainConfig
from components.weights.devices import choose_device


@dataclass(frozen=True)
class Ranks:
    """One process's place in the mesh, and how the ranks partition a run's work and state.

    Attributes:
        rank, world: of the process group.
        device: that this process drives.
        precision: of weights and activations, ``fp32`` or ``bf16``.
        expert_parallel: ranks that share one copy of the experts.
        zero_stage: what DeepSpeed partitions: 1 the optimizer's state, 2 the gradients too.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    expert_parallel: int = 1
    zero_stage: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype of weights and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.rank % self.expert_parallel

    def local_experts(self, experts: int) -> range:
        """Global indices of this rank's experts among ``experts``."""
        local = experts // self.expert_parallel
        return range(self.expert_rank * local, (self.expert_rank + 1) * local)

    def check_experts(self, experts: int) -> None:
        """Refuse an impossible mesh.

        Raises:
            StageError: ``expert_parallel`` does not divide the processes or the experts.
        """
        for count, what in ((self.world, "processes"), (experts, "experts")):
            if count % self.expert_parallel:
                allowed = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
                raise StageError(
                    f"expert_parallel is {self.expert_parallel}; it must divide the number of {what}, which is "
                    f"{count}, so it can be {allowed}."
                )

    def mesh(self) -> dict[str, Any]:
        """What decides how the state is partitioned, as checkpoints record it: the same on all ranks."""
        return {
            "processes": self.world,
            "expert_parallel": self.expert_parallel,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
        }


ALONE = Ranks()
"""A run of one process, on the CPU in fp32."""


def describe_mesh(mesh: Mapping[str, Any]) -> str:
    """A checkpoint's :meth:`Ranks.mesh` in words."""
    return (
        f"{mesh['processes']} processes (expert_parallel {mesh['expert_parallel']}, "
        f"ZeRO {mesh['zero_stage']}, {mesh['precision']})"
    )


def choose_precision(config: PretrainConfig, device: str) -> str:
    """``bf16`` or ``fp32``; ``auto`` takes bf16 where the hardware has instructions for it and need not emulate it."""
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def join_processes(config: PretrainConfig) -> Ranks:
    """Join torch's process group: torchrun's when its environment is there, else one of this process alone.

    A process that joined before keeps its group, so that several runs can follow one another.
    """
    kind = choose_device(config.device).type
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
            # An in-memory store needs no port and no host name, which a laptop without network may lack.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    return Ranks(
        rank, world, device, choose_precision(config, kind), config.expert_parallel, config.zero_stage
    )
