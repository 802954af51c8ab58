"""Whether every rank's device computes and every connection carries, before a run begins: ``check_health(ranks)``.

A device that computes wrong bits or a cable that does not carry costs hours when training finds out. All ranks
multiply the same matrices twice; devices of one kind must get the same bits. Then a collective of the training's own
backend must give the right sum.
"""

from __future__ import annotations

import hashlib
import socket
from typing import Any

import torch
import torch.distributed as dist

from components.artifacts import StageError
from components.pretraining.processes.ranks import Ranks

# How long connections may take to come about, in seconds: NCCL's own limit.
CONNECTING_S = 600
# Free at the start: what another process holds will be missing at the peak.
_FREE_SHARE = 0.9


def _digest(ranks: Ranks, size: int) -> str:
    generator = torch.Generator().manual_seed(20250728)
    a, b = (torch.randn(size, size, generator=generator).to(ranks.device, ranks.dtype) for _ in range(2))
    product = torch.mm(a, b).float().cpu()
    return hashlib.sha256(product.numpy().tobytes()).hexdigest()


def _examine(ranks: Ranks) -> dict[str, Any]:
    """What this rank can say of its own device."""
    size = 4096 if ranks.device.type == "cuda" else 128
    found: dict[str, Any] = {"host": socket.gethostname(), "kind": "cpu", "trouble": ""}
    try:
        if ranks.device.type == "cuda":
            properties = torch.cuda.get_device_properties(ranks.device)
            found["kind"] = properties.name
            free, total = torch.cuda.mem_get_info(ranks.device)
            if free < _FREE_SHARE * total:
                found["trouble"] = f"only {free / 1e9:.0f} of {total / 1e9:.0f} GB of its memory are free"
        first, second = _digest(ranks, size), _digest(ranks, size)
        if first != second:
            found["trouble"] = "two equal matrix products differ"
        found["digest"] = first
    except RuntimeError as error:  # what torch makes of every error of a device
        found["trouble"] = str(error).splitlines()[0]
    return found


def _odd_ones(found: list[dict[str, Any]]) -> dict[int, str]:
    """Ranks that are in trouble, or that do not compute what most of their kind do."""
    troubles = {rank: entry["trouble"] for rank, entry in enumerate(found) if entry["trouble"]}
    for kind in {entry["kind"] for entry in found}:
        sound = [entry for entry in found if entry["kind"] == kind and not entry["trouble"]]
        digests = [entry["digest"] for entry in sound]
        if not digests:
            continue
        usual = max(digests, key=digests.count)
        even = 2 * digests.count(usual) <= len(digests) and len(digests) > 1
        for rank, entry in enumerate(found):
            if entry in sound and even:
                troubles.setdefault(
                    rank, "ranks of its kind disagree on a matrix product, and none has most with it"
                )
            elif entry in sound and entry["digest"] != usual:
                troubles.setdefault(rank, "its matrix product is not what the other ranks get")
    return troubles


def check_health(ranks: Ranks) -> None:
    """Compare all ranks' devices and try the connections (a collective).

    Raises:
        StageError: names the ranks, hosts and what is wrong with each.
    """
    group = dist.new_group(backend="gloo")
    found: list[dict[str, Any]] = [{}] * ranks.world
    dist.all_gather_object(found, _examine(ranks), group=group)
    dist.destroy_process_group(group)
    troubles = _odd_ones(found)
    if not troubles:
        # 64 MiB on GPUs: enough to go over every rail.
        count = (1 << 24) if ranks.device.type == "cuda" else 1 << 10
        mine = torch.full((count,), float(ranks.rank + 1), device=ranks.device)
        dist.all_reduce(mine)
        wanted = ranks.world * (ranks.world + 1) / 2
        # Every rank must raise or none, or the others would wait for it.
        wrong = torch.tensor([float((mine != wanted).any())], device=ranks.device)
        dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
        if wrong.item():
            troubles = dict.fromkeys(range(ranks.world), "a sum over all ranks is wrong")
    if troubles:
        told = "; ".join(
            f"rank {rank} on {found[rank]['host']}: {what}" for rank, what in list(troubles.items())[:8]
        )
        raise StageError(
            f"{len(troubles)} of {ranks.world} ranks are not fit to train: {told}. Leave these machines out "
            "(sbatch --exclude=HOST) and run the same command again"
        )
