"""Gradients travel once a step, in fp32, to the ranks that hold their optimizer's state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pretraining.children import Children
from tests.pretraining.reductions import count, step_config

SMALL = 512  # elements: norms, losses and expert counts


@pytest.mark.parametrize(
    ("world", "expert_parallel", "precision"),
    [
        (4, 2, "bf16"),
        *(
            pytest.param(world, size, precision, marks=pytest.mark.campaign)
            for world in (4, 8)
            for size in (1, 2, 4)
            for precision in ("fp32", "bf16")
        ),
    ],
)
def test_gradients_are_reduced_once_a_step_in_fp32(
    tmp_path: Path, tokens: Path, children: Children, world: int, expert_parallel: int, precision: str
) -> None:
    fields = {"precision": precision, "expert_parallel": expert_parallel, "zero_stage": 1}
    cases = [step_config(world, micro_steps, **fields) for micro_steps in (1, 8)]
    children.call_ranks(world, count, cases, tokens, tmp_path / "sent.json")
    for found in json.loads((tmp_path / "sent.json").read_text()):
        large = [entry for entry in found["gradients"] if entry[1] > SMALL]
        assert len(large) == len(found["held"])
        for (name, elements, dtype, ranks), held, experts in zip(
            large, found["held"], found["experts"], strict=True
        ):
            assert (name, dtype) == ("reduce_scatter_tensor", "torch.float32")
            # Partitions are of one size, so a group is filled up to a multiple of twice its ranks.
            assert held <= elements < held + 2 * ranks
            assert ranks == (world // expert_parallel if experts else world)
        # The optimizer's step then sends new weights, in the working dtype.
        assert {name for name, elements, *_ in found["step"] if elements > SMALL} <= {
            "all_gather_into_tensor"
        }


@pytest.mark.campaign
def test_zero_2_sends_them_at_every_micro_step(tmp_path: Path, tokens: Path, children: Children) -> None:
    """Also in fp32; the plan and the documentation say so."""
    cases = [step_config(4, micro_steps, precision="bf16", zero_stage=2) for micro_steps in (1, 8)]
    children.call_ranks(4, count, cases, tokens, tmp_path / "sent.json")
    one, eight = (
        sum(size for _, size, dtype, _ in found["gradients"] if size > SMALL and dtype == "torch.float32")
        for found in json.loads((tmp_path / "sent.json").read_text())
    )
    assert eight == 8 * one > 0
