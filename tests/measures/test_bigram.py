"""The bigram baseline against Chen and Goodman's formula written out, and its sums."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.measures.bigram import BigramModel, discounts

VOCABULARY = 9
STREAMS = st.lists(st.lists(st.integers(0, VOCABULARY - 2), max_size=60), min_size=1, max_size=3).filter(
    lambda streams: any(len(stream) > 1 for stream in streams)
)


def discount(counts: list[int]) -> list[float]:
    """D for counts 0 to 3+, from the counts of counts."""
    n = [sum(count == i for count in counts) for i in (1, 2, 3, 4)]
    if 0 in n:
        return [0.0, 0.5, 0.5, 0.5]
    y = n[0] / (n[0] + 2 * n[1])
    raw = [1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
    return [0.0, *(min(max(d, 0.01), i) for i, d in enumerate(raw, 1))]


def brute_force(streams: list[list[int]], size: int) -> list[list[float]]:
    """p(w|v) by loops."""
    pairs = Counter(pair for stream in streams for pair in pairwise(stream))
    high = discount(list(pairs.values()))
    before = Counter(w for _, w in pairs)
    low = discount([before[w] for w in range(size)])
    kinds = len(pairs)
    spared = sum(low[min(before[w], 3)] for w in range(size))
    lower = [(before[w] - low[min(before[w], 3)]) / kinds + spared / kinds / size for w in range(size)]
    table = []
    for v in range(size):
        total = sum(pairs[v, w] for w in range(size))
        if total == 0:
            table.append(lower)
            continue
        gamma = sum(high[min(pairs[v, w], 3)] for w in range(size)) / total
        table.append(
            [(pairs[v, w] - high[min(pairs[v, w], 3)]) / total + gamma * lower[w] for w in range(size)]
        )
    return table


def arrays(streams: list[list[int]]) -> list[np.ndarray]:
    return [np.array(stream, dtype=np.uint16) for stream in streams]


def probabilities(model: BigramModel) -> np.ndarray:
    """The whole table, through the public door."""
    size = model.vocab_size
    return np.array([[math.exp(-model.nats(np.array([v, w]))[0]) for w in range(size)] for v in range(size)])


@given(STREAMS)
@settings(max_examples=60, deadline=None)
def test_probabilities_are_the_formula_and_sum_to_one(streams: list[list[int]]) -> None:
    found = probabilities(BigramModel.fit(arrays(streams), VOCABULARY))
    assert found.sum(axis=1) == pytest.approx(np.ones(VOCABULARY), abs=1e-9)
    assert (found > 0).all()
    np.testing.assert_allclose(found, np.array(brute_force(streams, VOCABULARY)), rtol=1e-9)


def test_real_discounts_are_reached() -> None:
    """Enough counts of one to four at both orders that the modified discounts act, not the fallback."""
    random = np.random.default_rng(0)
    stream = (random.zipf(1.5, 3000) % 60).tolist()
    model = BigramModel.fit(arrays([stream]), 61)
    table = brute_force([stream], 61)
    pairs = list(Counter(pairwise(stream)).values())
    assert discount(pairs) != [0.0, 0.5, 0.5, 0.5]
    assert discounts(np.array(pairs)) == pytest.approx(discount(pairs))
    text = random.integers(0, 61, 500)
    expected = [-math.log(table[v][w]) for v, w in pairwise(text.tolist())]
    np.testing.assert_allclose(model.nats(text), expected, rtol=1e-9)
    assert model.nats(np.array(stream)).mean() < math.log(61)


def test_an_unseen_history_backs_off_entirely() -> None:
    model = BigramModel.fit(arrays([[0, 1, 0, 2, 0, 1]]), 5)
    assert model.backoff_V[4] == 1.0
    from_unseen = np.exp(-model.nats(np.array([4, 1]))), np.exp(-model.nats(np.array([4, 3])))
    assert from_unseen[0] == pytest.approx(model.lower_V[1]) and from_unseen[1] > 0
    # Token 2 ends no stream here, yet 1 does: as a history it has one pair only.
    assert probabilities(model).sum(axis=1) == pytest.approx(np.ones(5))


def test_pairs_across_streams_do_not_count() -> None:
    apart = BigramModel.fit(arrays([[0, 1], [2, 3]]), 4)
    assert sorted(apart.codes.tolist()) == [0 * 4 + 1, 2 * 4 + 3]


def test_a_long_stream_loses_no_pair_at_the_chunks_edge() -> None:
    edge = 1 << 22
    stream = np.zeros(edge + 3, dtype=np.uint16)
    stream[edge : edge + 2] = [1, 2]
    model = BigramModel.fit([stream], 3)
    assert sorted(model.codes.tolist()) == [0, 1, 1 * 3 + 2, 2 * 3 + 0]
    # c(0) is edge: the pair (0, 0) edge - 1 times.
    assert model.discounted[0] == pytest.approx((edge - 1 - 0.5) / edge, rel=1e-12)


def test_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        BigramModel.fit(arrays([[1], []]), 4)
