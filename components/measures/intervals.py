"""Intervals of 95 %: ``wilson_interval(7, 10)``, ``paired_interval(differences)``, ``bootstrap_ratio(a, b)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
_BOOTSTRAP_SAMPLES = 1000
_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Score:
    """A share of right answers in [0, 1] with its 95 % Wilson interval."""

    value: float
    n: int
    ci_low: float
    ci_high: float

    @classmethod
    def of(cls, right: int, n: int) -> Score:
        """Score of ``right`` answers among ``n``."""
        low, high = wilson_interval(right, n)
        return cls(right / n if n else 0.0, n, low, high)


def wilson_interval(right: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927), within [0, 1]; (0, 1) when ``n`` is 0.

    Raises:
        ValueError: ``right`` is not within [0, n].
    """
    if not 0 <= right <= n:
        raise ValueError(f"{right} right answers among {n} is impossible")
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, _Z95 * _Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the bounds are exactly 0 and 1; rounding must not move them past the share.
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of differences on the same items, and its 95 % interval by the normal approximation.

    Raises:
        ZeroDivisionError: there are no items.
    """
    n = len(differences)
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    half = _Z95 * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def paired_interval_of_few(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ``values - base``, and its 95 % interval by Student's t: for a handful of seeds in pairs.

    With one pair the interval is unbounded.

    Raises:
        ValueError: the two are not of one length, or empty.
    """
    if len(values) != len(base) or not values:
        raise ValueError(f"{len(values)} values and {len(base)} to compare them with are no pairs")
    differences = np.subtract(values, base)
    mean = float(differences.mean())
    if len(differences) == 1:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    return mean, mean - half, mean + half


def bootstrap_ratio(numerators: Floats, denominators: Floats, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of ``sum(numerators) / sum(denominators)``, resampling pairs (windows of text)."""
    draw = np.random.default_rng(seed).integers(0, len(numerators), (_BOOTSTRAP_SAMPLES, len(numerators)))
    ratios = numerators[draw].sum(axis=1) / denominators[draw].sum(axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
