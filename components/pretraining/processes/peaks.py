"""How much memory the processes of a run took at most: ``gather_peaks()``, after training."""

from __future__ import annotations

import resource

import torch
import torch.distributed as dist

_KIB = 1024  # Linux gives ru_maxrss in these


def gather_peaks() -> dict[str, int]:
    """Every rank's peaks in bytes, the greatest and the sum: a collective; for ``ProcessPeaks`` in the manifest."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    device = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    mine = torch.tensor([host, device], dtype=torch.int64)
    if dist.is_initialized() and dist.get_backend() == "nccl":
        mine = mine.to("cuda")
    greatest, total, world = mine.clone(), mine.clone(), 1
    if dist.is_initialized():
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        dist.all_reduce(total)
        world = dist.get_world_size()
    return {
        "processes": world,
        "host_bytes_greatest": int(greatest[0]),
        "host_bytes_sum": int(total[0]),
        "device_bytes_greatest": int(greatest[1]),
        "device_bytes_sum": int(total[1]),
    }
