"""Token-bigram baseline with interpolated modified Kneser-Ney smoothing: ``BigramModel.fit(streams, vocab)``.

Chen and Goodman (1999), section 4.1, at order 2: p(w|v) = max(c(vw) - D, 0)/c(v) + gamma(v) p1(w), where p1 is the
discounted continuation distribution interpolated with the uniform one, and the three discounts of each order come
from the counts of counts, so that nothing is tuned on held-out text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]


def discounts(counts: Int64s) -> Floats:
    """D for counts 0, 1, 2 and 3 or more (Chen and Goodman, equation 26); absolute 0.5 where counts are too few."""
    n = [float((counts == i).sum()) for i in range(1, 5)]
    if min(n) <= 0.0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[0] / (n[0] + 2.0 * n[1])
    raw = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
    return np.array([0.0, *(min(max(d, 0.01), i) for i, d in enumerate(raw, 1))])


@dataclass(frozen=True)
class BigramModel:
    """A fitted bigram model over ``vocab_size`` tokens.

    Attributes:
        codes: sorted ``v * vocab_size + w`` of every pair seen.
        discounted: max(c(vw) - D, 0) / c(v) of every pair seen.
        backoff_V: gamma(v); 1 for a ``v`` never seen.
        lower_V: p1(w); sums to 1.
    """

    vocab_size: int
    codes: Int64s
    discounted: Floats
    backoff_V: Floats
    lower_V: Floats

    @classmethod
    def fit(cls, streams: Iterable[npt.NDArray[np.integer]], vocab_size: int) -> BigramModel:
        """Count the pairs of every stream (pairs across two streams do not count).

        Raises:
            ValueError: no stream has two tokens.
        """
        codes = np.empty(0, dtype=np.int64)
        counts = np.empty(0, dtype=np.int64)
        for stream in streams:
            for begin in range(0, max(0, len(stream) - 1), 1 << 22):
                part = stream[begin : begin + (1 << 22) + 1].astype(np.int64)
                seen, number = np.unique(part[:-1] * vocab_size + part[1:], return_counts=True)
                merged, where = np.unique(np.concatenate([codes, seen]), return_inverse=True)
                counts = np.bincount(where, weights=np.concatenate([counts, number])).astype(np.int64)
                codes = merged
        if codes.size == 0:
            raise ValueError("a bigram model needs at least two tokens")
        first, second = codes // vocab_size, codes % vocab_size
        amount = discounts(counts)[np.minimum(counts, 3)]
        total_V = np.bincount(first, weights=counts, minlength=vocab_size)
        held_back_V = np.bincount(first, weights=amount, minlength=vocab_size)
        backoff_V = np.divide(held_back_V, total_V, out=np.ones(vocab_size), where=total_V > 0)
        continuation_V = np.bincount(second, minlength=vocab_size).astype(np.int64)
        lower_amount_V = discounts(continuation_V)[np.minimum(continuation_V, 3)]
        mass = float(continuation_V.sum())
        lower_V = (continuation_V - lower_amount_V) / mass + lower_amount_V.sum() / mass / vocab_size
        return cls(vocab_size, codes, (counts - amount) / total_V[first], backoff_V, lower_V)

    def nats(self, stream: npt.NDArray[np.integer]) -> Floats:
        """-ln p of every token of ``stream`` after its first, given the token before it."""
        tokens = stream.astype(np.int64)
        first, second = tokens[:-1], tokens[1:]
        wanted = first * self.vocab_size + second
        where = np.minimum(np.searchsorted(self.codes, wanted), self.codes.size - 1)
        direct = np.where(self.codes[where] == wanted, self.discounted[where], 0.0)
        result: Floats = -np.log(direct + self.backoff_V[first] * self.lower_V[second])
        return result
