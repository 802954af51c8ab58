"""A worker of a small torchrun job that gets stuck: ``python -m tests.cluster.stuck FOLDER``.

Rank 0 waits in a collective, rank 1 for data that do not come, rank 2 in a C function that holds the interpreter.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from components.artifacts import die_with_parent
from components.pretraining.processes.heartbeat import beat

LIMIT_S = 3.0


def read_window(path: Path) -> bytes:
    """Opens a pipe that nobody writes to."""
    return path.read_bytes()


def main(folder: Path) -> None:
    die_with_parent()
    rank = int(os.environ["RANK"])
    beat(0, "the start", 3600)
    dist.init_process_group("gloo")
    dist.barrier()
    beat(12, "the step", LIMIT_S)
    if rank == 1:
        read_window(folder / "pipe")
    if rank == 2:
        ctypes.PyDLL(None).sleep(100_000)
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
