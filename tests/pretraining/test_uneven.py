"""Global batches that processes and micro-batches do not divide: what is learned is what one process learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import StageError
from components.pretraining.config import PretrainConfig
from components.pretraining.data.accumulation import BatchCut, accumulation_steps
from tests.pretraining.children import Children
from tests.pretraining.factory import CONTEXT, run_config, stage_config
from tests.pretraining.plain_loop import Run, plain_run, train_all
from tests.pretraining.test_training_step import assert_equals, exact, logged

SEQUENCES, LAST = 11, 7
TOLERANCE = 1e-5


def uneven(**values: Any) -> dict[str, Any]:
    """Eleven sequences a step, then seven twice as long ones; micro-batches of two, which divide neither."""
    shapes = [(2, SEQUENCES, CONTEXT), (1, SEQUENCES, CONTEXT), (2, LAST, 2 * CONTEXT)]
    return exact(shapes, **{"sequences_per_micro_batch": 2, **values})


def cut_of(sequences: int, groups: int, world: int, micro: int) -> BatchCut:
    stage = stage_config(sequences_per_step=sequences, tokens=20 * sequences * CONTEXT)
    values = run_config(stages=[stage] * 3, sequences_per_micro_batch=micro, load_balance_groups=groups)
    return BatchCut.of(PretrainConfig.model_validate(values), 0, world)


@given(st.data())
def test_every_row_is_dealt_once_and_ranks_keep_step(data: st.DataObject) -> None:
    sequences = data.draw(st.integers(1, 60))
    groups, world = data.draw(st.integers(1, sequences)), data.draw(st.integers(1, sequences))
    micro = data.draw(st.integers(1, 12))
    cut = cut_of(sequences, groups, world, micro)
    assert 1 <= cut.micro_batch <= micro
    taken: list[list[int]] = []
    of_group: dict[int, list[int]] = {}
    for rank in range(world):
        mine: list[int] = []
        for turn in range(cut.turns):
            for number in range(cut.micro_steps_per_group):
                rows = list(range(sequences))[cut.rows(rank, turn, number)]
                assert len(rows) <= cut.micro_batch
                mine += rows
                of_group.setdefault(rank // cut.sharing * cut.turns + turn, []).extend(rows)
        taken.append(mine)
    assert sorted(row for rows in taken for row in rows) == list(range(sequences))
    assert min(map(len, taken)) >= 1 and max(map(len, taken)) <= min(map(len, taken)) + cut.micro_batch
    # Groups are slices of the batch, whatever the number of ranks.
    assert len(of_group) == groups
    for group, rows in of_group.items():
        assert sorted(rows) == list(range(group * sequences // groups, (group + 1) * sequences // groups))


def test_cuts_of_the_21b() -> None:
    """4,352 sequences are 256 x 17; with one node of eight less, 18 micro-steps of which two in a hundred are idle."""
    whole, fewer = cut_of(4352, 8, 256, 1), cut_of(4352, 8, 248, 1)
    assert (whole.micro_steps, whole.computed_rows) == (17, 4352)
    assert (fewer.micro_steps, fewer.micro_batch, fewer.computed_rows) == (18, 1, 18 * 248)
    assert (cut_of(4352, 8, 256, 4).micro_batch, cut_of(4352, 8, 256, 4).micro_steps) == (4, 5)


def test_what_is_impossible_is_named() -> None:
    config = PretrainConfig.model_validate(uneven())
    assert [accumulation_steps(config, 0, world) for world in (1, 2, 3, 5, 11)] == [6, 3, 2, 2, 1]
    with pytest.raises(
        StageError, match=r"stage3 is 7 sequences and there are 8 processes.*1 to 7 are allowed"
    ):
        accumulation_steps(config, 2, 8)


def test_three_processes_go_on_where_four_stopped(tmp_path: Path, tokens: Path, children: Children) -> None:
    """Three groups, which divide neither the batch nor four processes; a stop in the second training stage."""
    config = uneven(load_balance_groups=3)
    children.call_ranks(4, train_all, [Run("run", config, stop_at=2, go_on=False)], tokens, tmp_path)
    children.call_ranks(3, train_all, [Run("run", config)], tokens, tmp_path)
    assert_equals(tmp_path / "run", plain_run(PretrainConfig.model_validate(config), tokens), TOLERANCE)


@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_six_processes_that_share_experts_in_pairs(
    tmp_path: Path, tokens: Path, children: Children, zero_stage: int
) -> None:
    """Micro-steps in which some ranks have no row, and every figure that is logged."""
    config = uneven(log_every_steps=2)
    shared = Run("shared", {**config, "expert_parallel": 2, "zero_stage": zero_stage})
    children.call_ranks(6, train_all, [shared], tokens, tmp_path)
    alone = Run("alone", {**config, "sequences_per_micro_batch": 1})  # without padding
    children.call_ranks(1, train_all, [alone], tokens, tmp_path)
    found, wanted = (logged(tmp_path / run.name) for run in (shared, alone))
    assert len(wanted) == 4 and found.keys() == wanted.keys()
    for step, metrics in wanted.items():
        assert found[step] == pytest.approx(metrics, rel=TOLERANCE), step


@pytest.mark.campaign
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7])
def test_every_cut(tmp_path: Path, tokens: Path, children: Children, world: int) -> None:
    """Eight minutes for all: groups and micro-batches that divide something or nothing, experts shared, both ZeRO."""
    for domains, groups in (("mixed", 1), ("mixed", 3), ("sharded", 4), ("mixed", 7)):
        config = uneven(load_balance_groups=groups, load_balance_domains=domains)
        runs = [
            Run(
                f"groups-{groups}-micro-{micro}-experts-{size}-zero-{zero_stage}",
                {
                    **config,
                    "sequences_per_micro_batch": micro,
                    "expert_parallel": size,
                    "zero_stage": zero_stage,
                },
            )
            for micro, zero_stage in ((1, 1), (3, 2), (16, 1))
            for size in (1, 2, 4)
            if world % size == 0
        ]
        children.call_ranks(world, train_all, runs, tokens, tmp_path)
        plain = plain_run(PretrainConfig.model_validate(config), tokens)
        for run in runs:
            # A sum in another order can silence one neuron more: its gradient jumps, the loss does not.
            assert_equals(tmp_path / run.name, plain, TOLERANCE, of_gradients=1e-4)
