"""Deterministic data order: ``SequenceOrder(...).step(n)`` says which windows of which category step n trains on.

The order is a pure function of (seed, step): no state is saved, any step can be replayed, and the number of
processes does not enter. Two counter-based pieces make it so:

- how many sequences of each category a step takes: systematic sampling of the mixture with one Philox draw per
  step, so that counts differ from ``share * batch`` by less than one and are right on average;
- which windows: the n-th sequence of a category is window ``permutation(n mod W)`` of epoch ``n div W``, where the
  permutation of the W windows is a keyed Feistel network with cycle walking. Every window is seen once per
  epoch and nothing of size W is held in memory. Each epoch shifts all windows by a random part of the tokens that
  are left over at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from components.artifacts import StageError
from components.corpus.categories import CATEGORIES
from components.pretraining.data.curriculum import Curriculum, TrainingStageSpan

_MASK32 = np.uint64(0xFFFFFFFF)
_ROUNDS = 6
# Domains of the Philox key: draws for different purposes never share a stream.
_COUNTS, _EPOCH_KEYS, _SHUFFLE = 1, 2, 3

Int64s = npt.NDArray[np.int64]


def philox(seed: int, *counters: int) -> np.random.Generator:
    """Counter-based generator: a stream that depends on ``seed`` and up to four counters only."""
    words = list(counters) + [0] * (4 - len(counters))
    return np.random.Generator(np.random.Philox(key=seed, counter=words))


def permute(index: Int64s, size: int, keys: npt.NDArray[np.uint64]) -> Int64s:
    """Apply a keyed bijection of ``range(size)`` to every element of ``index``.

    A balanced Feistel network over the next even number of bits, applied again until the value falls below
    ``size`` (cycle walking), which keeps it a bijection.
    """
    if size <= 1:
        return np.zeros_like(index)
    half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half_bits)) - 1)
    values = index.astype(np.uint64)
    pending = np.ones(values.shape, dtype=bool)
    while pending.any():
        left, right = values[pending] >> half_bits, values[pending] & mask
        for key in keys:
            mixed = (right ^ key) & _MASK32
            mixed = (mixed * np.uint64(0x9E3779B1)) & _MASK32
            mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(0x85EBCA77)) & _MASK32
            mixed ^= mixed >> np.uint64(13)
            left, right = right, (left ^ mixed) & mask
        values[pending] = (left << half_bits) | right
        pending = values >= np.uint64(size)
    return values.astype(np.int64)


@dataclass(frozen=True)
class Sequences:
    """The sequences of one step in order: category index (into ``CATEGORIES``) and first token of each."""

    category_B: Int64s
    start_B: Int64s

    def describe(self) -> str:
        """The batch in words, for error messages: category and first token of every sequence."""
        pairs = zip(self.category_B.tolist(), self.start_B.tolist(), strict=True)
        return ", ".join(f"{CATEGORIES[category]}@{start}" for category, start in pairs)


def effective_mixture(
    span: TrainingStageSpan, available_tokens: Mapping[str, int], absent_category: str
) -> tuple[dict[str, float], list[str]]:
    """The training stage's mixture over categories that the shards hold, and the wanted ones that they lack.

    A category counts as held when it has at least one whole window (``context`` tokens).

    Raises:
        StageError: a wanted category is absent and ``absent_category`` is ``error``, or nothing is left.
    """
    wanted = {name: share for name, share in span.stage.mixture.items() if share > 0}
    absent = [name for name in wanted if available_tokens.get(name, 0) < span.stage.context]
    if absent and absent_category == "error":
        counts = ", ".join(f"{name} {available_tokens.get(name, 0)}" for name in absent)
        raise StageError(
            f"The mixture of {span.name} wants categories that the shards lack or hold less than one window "
            f"({span.stage.context} tokens) of: {counts}. Tokenise them, set their share to 0, or set "
            "absent_category to renormalise."
        )
    left = {name: share for name, share in wanted.items() if name not in absent}
    total = sum(left.values())
    if total <= 0:
        raise StageError(
            f"None of the categories of {span.name} ({', '.join(wanted)}) has tokens in the shards."
        )
    return {name: left.get(name, 0.0) / total for name in CATEGORIES}, absent


class SequenceOrder:
    """Which sequences every step of the run trains on.

    Args:
        seed: seed of the order.
        curriculum: the run's training stages.
        mixtures: effective mixture of every training stage.
        tokens: tokens that the shards hold, by category.
    """

    def __init__(
        self,
        seed: int,
        curriculum: Curriculum,
        mixtures: tuple[Mapping[str, float], ...],
        tokens: Mapping[str, int],
    ) -> None:
        self._seed = seed
        self._curriculum = curriculum
        self._tokens = [int(tokens.get(name, 0)) for name in CATEGORIES]
        self._cumulative: list[Int64s] = []
        for span, mixture in zip(curriculum.spans, mixtures, strict=True):
            shares = np.array([mixture[name] for name in CATEGORIES])
            counts = self._counts(span, shares)
            taken = np.zeros((counts.shape[0] + 1, len(CATEGORIES)), dtype=np.int64)
            np.cumsum(counts, axis=0, out=taken[1:])
            # Training stages of equal context share one epoch: a later one goes on where the earlier one stopped.
            for earlier, table in zip(curriculum.spans, self._cumulative, strict=False):
                if earlier.stage.context == span.stage.context:
                    taken = taken + (table[-1] - table[0])
            self._cumulative.append(taken)

    def _counts(self, span: TrainingStageSpan, shares: npt.NDArray[np.float64]) -> Int64s:
        """Sequences per step and category, ``[steps, categories]``; every row sums to the global batch."""
        steps, batch = span.stage.steps, span.stage.sequences_per_step
        offsets = philox(self._seed, _COUNTS, span.index).random(steps)
        edges = np.concatenate([[0.0], np.cumsum(shares)])
        edges[np.flatnonzero(shares)[-1] + 1 :] = 1.0  # rounding must not leave a sliver without category
        ticks = np.floor(edges[None, :] * batch + offsets[:, None]).astype(np.int64)
        return np.diff(ticks, axis=1)

    def windows(self, category: int, context: int) -> int:
        """Whole windows of ``context`` tokens that a category holds."""
        return self._tokens[category] // context

    def step(self, step: int) -> Sequences:
        """The sequences of optimizer step ``step`` (0-based), the same for every number of processes."""
        span = self._curriculum.at(step)
        context = span.stage.context
        table = self._cumulative[span.index]
        first, last = table[step - span.start], table[step - span.start + 1]
        categories: list[Int64s] = []
        starts: list[Int64s] = []
        for category in range(len(CATEGORIES)):
            serial = np.arange(first[category], last[category], dtype=np.int64)
            if serial.size:
                categories.append(np.full(serial.size, category, dtype=np.int64))
                starts.append(self._starts(category, context, serial))
        order = philox(self._seed, _SHUFFLE, step).permutation(span.stage.sequences_per_step)
        return Sequences(np.concatenate(categories)[order], np.concatenate(starts)[order])

    def _starts(self, category: int, context: int, serial: Int64s) -> Int64s:
        """First token of the ``serial``-th sequences of a category."""
        size = self.windows(category, context)
        slack = self._tokens[category] - size * context  # tokens by which an epoch's windows may shift
        starts = np.empty_like(serial)
        epochs = serial // size
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            generator = philox(self._seed, _EPOCH_KEYS, category, context, int(epoch))
            keys = generator.integers(0, 1 << 32, size=_ROUNDS, dtype=np.uint64)
            shift = int(generator.integers(0, slack + 1))
            starts[chosen] = permute(serial[chosen] % size, size, keys) * context + shift
        return starts
