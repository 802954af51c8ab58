"""Data order: a bijection, once per epoch, right on average, and the same for every number of processes."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import StageError
from components.corpus.categories import CATEGORIES
from components.corpus.shards import TokenShards
from components.pretraining.config import PretrainConfig
from components.pretraining.data.accumulation import accumulation_steps
from components.pretraining.data.batches import BatchSource
from components.pretraining.data.curriculum import Curriculum
from components.pretraining.data.ordering import SequenceOrder, effective_mixture, permute, philox
from tests.pretraining.factory import CONTEXT, run_config, stage_config

AVAILABLE = {"general": 1000, "maths": 333, "code": 64, "web_stem": 40, "chinese": 17, "sft": 129}


@given(size=st.integers(1, 3000), keys=st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(size: int, keys: list[int]) -> None:
    image = permute(np.arange(size, dtype=np.int64), size, np.array(keys, dtype=np.uint64))
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 255, 256, 257, 1023, 1024, 1025, 4096, 4097])
def test_permute_around_powers_of_two(size: int) -> None:
    keys = philox(size).integers(0, 1 << 32, size=6, dtype=np.uint64)
    image = permute(np.arange(size, dtype=np.int64), size, keys)
    assert np.array_equal(np.sort(image), np.arange(size))
    if size > 200:  # and it shuffles: few fixed points, no runs
        assert (image == np.arange(size)).sum() < 10 and (np.diff(image) == 1).sum() < 10


def test_permute_keeps_to_a_huge_range_and_does_not_collide() -> None:
    size = 3_000_000_019  # windows of a 12-trillion-token corpus
    keys = philox(1).integers(0, 1 << 32, size=6, dtype=np.uint64)
    image = permute(np.arange(100_000, dtype=np.int64), size, keys)
    assert image.min() >= 0 and image.max() < size and np.unique(image).size == image.size
    assert 0.45 < image.mean() / size < 0.55


def order_of(tokens: dict[str, int] = AVAILABLE, **values: Any) -> SequenceOrder:
    config = PretrainConfig.model_validate(run_config(**values))
    curriculum = Curriculum(config)
    mixtures = tuple(effective_mixture(span, tokens, "renormalise")[0] for span in curriculum.spans)
    return SequenceOrder(config.seed, curriculum, mixtures, tokens)


def long_stages(steps: int, mixture: dict[str, float], batch: int = 8) -> list[dict[str, Any]]:
    part = stage_config(tokens=steps * batch * 16, sequences_per_step=batch, mixture=mixture)
    return [part, part, {**part, "context": 32, "tokens": 2 * part["tokens"]}]


@pytest.mark.parametrize("left_over", [0, 11])
def test_every_window_is_seen_once_per_epoch(left_over: int) -> None:
    tokens = {"general": 16 * 36 + left_over}
    order = order_of(tokens, stages=long_stages(48, {"general": 1.0}, batch=4))
    # Stages 1 and 2 have equal context: one pass goes on through both, 9 steps an epoch.
    starts = np.concatenate([order.step(step).start_B for step in range(90)]).reshape(10, 36)
    for epoch in starts:
        assert np.array_equal(np.diff(np.sort(epoch)), np.full(35, 16))
        assert epoch.min() >= 0 and epoch.max() + 16 <= tokens["general"]
    assert (len({int(epoch.min()) for epoch in starts}) > 3) == (left_over > 0)  # epochs shift
    assert len({tuple(epoch.tolist()) for epoch in starts}) == 10  # and each has its own order


def test_an_epoch_that_ends_within_a_step_repeats_no_window_early() -> None:
    order = order_of({"general": 16 * 37}, stages=long_stages(48, {"general": 1.0}, batch=4))
    seen: Counter[int] = Counter()
    for step in range(96):
        seen.update(order.step(step).start_B.tolist())
        counts = [seen[16 * window] for window in range(37)]
        assert sum(counts) == 4 * (step + 1) and max(counts) - min(counts) <= 1


def test_a_single_window_is_repeated() -> None:
    order = order_of({"general": 20}, stages=[stage_config(mixture={"general": 1.0})] * 3)
    starts = np.concatenate([order.step(step).start_B for step in range(36)])
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    order = order_of()
    forward = [order.step(step) for step in range(36)]
    random = np.random.default_rng(0)
    for step in random.permutation(36).tolist():
        for again in (order.step(step), order_of().step(step)):
            assert np.array_equal(again.category_B, forward[step].category_B)
            assert np.array_equal(again.start_B, forward[step].start_B)
    other = [order_of(seed=12).step(step) for step in range(36)]
    assert sum(a.describe() == b.describe() for a, b in zip(forward, other, strict=True)) == 0


@given(
    shares=st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(any),
    batch=st.sampled_from([1, 3, 8, 17]),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=20, deadline=None)
def test_counts_per_category(shares: list[int], batch: int, seed: int) -> None:
    mixture = {name: share / sum(shares) for name, share in zip(CATEGORIES, shares, strict=True)}
    order = order_of(
        dict.fromkeys(CATEGORIES, 500),
        stages=long_stages(200, mixture, batch), seed=seed, sequences_per_micro_batch=1,
    )  # fmt: skip
    sums = np.zeros(len(CATEGORIES))
    for step in range(200):
        sequences = order.step(step)
        counts = np.bincount(sequences.category_B, minlength=len(CATEGORIES))
        assert counts.sum() == batch == len(sequences.start_B)
        for category, name in enumerate(CATEGORIES):
            assert abs(counts[category] - mixture[name] * batch) < 1 + 1e-9
            assert mixture[name] > 0 or counts[category] == 0
        sums += counts
    for category, name in enumerate(CATEGORIES):
        # Systematic sampling is unbiased, its variance at most 1/4 a step: within five standard errors.
        assert abs(sums[category] / 200 - mixture[name] * batch) < 5 * math.sqrt(0.25 / 200)


def test_whole_shares_are_met_exactly() -> None:
    order = order_of(stages=long_stages(50, {"general": 0.5, "maths": 0.25, "sft": 0.25}))
    for step in range(100):
        assert np.bincount(order.step(step).category_B, minlength=6).tolist() == [4, 2, 0, 0, 0, 2]


def test_starts_stay_inside_the_tokens() -> None:
    order = order_of()
    for step in range(36):
        sequences = order.step(step)
        context = 16 if step < 24 else 32
        for category, start in zip(sequences.category_B.tolist(), sequences.start_B.tolist(), strict=True):
            assert 0 <= start <= AVAILABLE[CATEGORIES[category]] - context
    # chinese has one window of 16 and none of 32.
    third = [order.step(step).category_B for step in range(24, 36)]
    assert CATEGORIES.index("chinese") not in np.concatenate(third)


def test_absent_categories() -> None:
    span = Curriculum(PretrainConfig.model_validate(run_config())).spans[0]
    lacking = {**AVAILABLE, "chinese": 15}
    mixture, absent = effective_mixture(span, lacking, "renormalise")
    assert (
        absent == ["chinese"] and mixture["chinese"] == 0 and math.fsum(mixture.values()) == pytest.approx(1)
    )
    assert mixture["general"] / mixture["maths"] == pytest.approx(2)
    with pytest.raises(StageError, match=r"stage1 wants.*\(16 tokens\) of: chinese 15.*absent_category"):
        effective_mixture(span, lacking, "error")
    with pytest.raises(StageError, match="None of the categories of stage1"):
        effective_mixture(span, {}, "renormalise")


def test_every_world_trains_on_the_same_rows(tokens: Path) -> None:
    config = PretrainConfig.model_validate(run_config(sequences_per_micro_batch=2))
    shards = TokenShards.open(tokens)
    streams = {name: shards.shard("train", name) for name in shards.categories("train")}
    source = BatchSource(config, streams, shards.eos_id)
    for step in (0, 5, 23, 24, 35):
        span = source.curriculum.at(step)
        sequences = source.sequences(step)
        wanted = source.read(sequences, span.stage.context).tolist()
        for row, category, start in zip(wanted, sequences.category_B, sequences.start_B, strict=True):
            assert row == shards.shard("train", CATEGORIES[category]).read(int(start), len(row)).tolist()
        for world in (1, 2, 4):
            micro_steps = accumulation_steps(config, span.index, world)
            ranks = [source.rank_groups(step, rank, world) for rank in range(world)]
            assert [[len(group) for group in groups] for groups in ranks] == [[micro_steps]] * world
            in_order = [ranks[r][0][a] for a in range(micro_steps) for r in range(world)]
            assert [row for batch in in_order for row in batch.input_ids_BT.tolist()] == wanted, (step, world)
            categories = [c for batch in in_order for c in batch.category_B.tolist()]
            assert categories == sequences.category_B.tolist()


@pytest.mark.parametrize("domains", ["mixed", "sharded"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_world_deals_the_same_rows_to_a_group(tokens: Path, groups: int, domains: str) -> None:
    config = PretrainConfig.model_validate(
        run_config(sequences_per_micro_batch=1, load_balance_groups=groups, load_balance_domains=domains)
    )
    plain = PretrainConfig.model_validate(run_config(sequences_per_micro_batch=1))
    shards = TokenShards.open(tokens)
    streams = {name: shards.shard("train", name) for name in shards.categories("train")}
    source, mixed = (BatchSource(one, streams, shards.eos_id) for one in (config, plain))
    for step in (0, 7, 30):
        context = source.curriculum.at(step).stage.context
        rows = source.read(source.sequences(step), context).tolist()
        everything = mixed.read(mixed.sequences(step), context).tolist()
        assert sorted(rows) == sorted(everything)  # dealing changes places, never what a step trains on
        size = len(rows) // groups
        for world in (1, 2, 4):
            sharing = max(1, world // groups)
            found: list[list[list[int]]] = [[] for _ in range(groups)]
            for rank in range(world):
                taken = source.rank_groups(step, rank, world)
                assert len(taken) == max(1, groups // world)
                first = rank // sharing if sharing > 1 else rank * len(taken)
                for offset, group in enumerate(taken):
                    found[first + offset] += [row for batch in group for row in batch.input_ids_BT.tolist()]
            for group in range(groups):
                assert sorted(found[group]) == sorted(rows[group * size : (group + 1) * size]), (world, group)
        if domains == "sharded":
            categories = source.sequences(step).category_B.tolist()
            assert categories == sorted(categories) and len(set(categories)) > 1


def test_micro_steps_of_an_even_cut() -> None:
    values = {"sequences_per_micro_batch": 1, "load_balance_groups": 4}
    stages = [stage_config(sequences_per_step=24, tokens=24 * CONTEXT)] * 3
    config = PretrainConfig.model_validate(run_config(**values, stages=stages, optimizer={"warmup_steps": 1}))
    assert [accumulation_steps(config, 0, world) for world in (1, 2, 4, 8)] == [24, 12, 6, 3]
