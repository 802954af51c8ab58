"""The check before a run: a device that computes wrong bits, or cannot compute, is named with its host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pretraining.children import Children

product = torch.mm


def flip_always(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A device with a bit that is stuck."""
    wrong = product(a, b)
    wrong[3, 5] *= 1 + 2.0**-20
    return wrong


def flip_sometimes(a: torch.Tensor, b: torch.Tensor, _calls: list[int] = []) -> torch.Tensor:  # noqa: B006
    """A device that errs now and then."""
    _calls.append(1)
    return flip_always(a, b) if len(_calls) % 2 else product(a, b)


def raise_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA")


def check(faults: dict[int, str], folder: Path) -> None:
    """One rank: with its device at fault, where that is asked; writes down what the check said."""
    from components.artifacts import StageError
    from components.pretraining.processes.health import check_health
    from components.pretraining.processes.ranks import Ranks

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank in faults:
        torch.mm = globals()[faults[rank]]
    said = ""
    try:
        check_health(Ranks(rank, dist.get_world_size()))
    except StageError as error:
        said = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("faults", "named"),
    [
        ({}, {}),
        ({2: "flip_always"}, {2: "its matrix product is not what the other ranks get"}),
        ({0: "flip_sometimes"}, {0: "two equal matrix products differ"}),
        ({1: "raise_error"}, {1: "CUDA error: uncorrectable ECC error encountered"}),
        (
            {0: "flip_always", 2: "raise_error"},
            {0: "its matrix product is not what", 2: "CUDA error"},
        ),
    ],
    ids=["sound", "always", "sometimes", "dead", "two"],
)
def test_what_is_not_fit_is_named(
    tmp_path: Path, children: Children, faults: dict[int, str], named: dict[int, Any]
) -> None:
    children.call_ranks(4, check, faults, tmp_path)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert len(set(said)) == 1  # all ranks stop, or none
    if not named:
        assert said[0] == ""
        return
    assert said[0].startswith(f"{len(named)} of 4 ranks are not fit to train: ")
    for rank, words in named.items():
        assert f"rank {rank} on {os.uname().nodename}: {words}" in said[0]
    assert all(f"rank {rank} on" not in said[0] for rank in range(4) if rank not in named)
    assert "sbatch --exclude=" in said[0]
