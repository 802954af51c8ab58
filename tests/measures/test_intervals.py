"""Confidence intervals against known values, and their coverage."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from components.measures.intervals import Score, bootstrap_ratio, wilson_interval


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # Newcombe 1998, Statistics in Medicine 17, table I, and scipy
        (81, 263, 0.255273, 0.366207),
        (15, 148, 0.062386, 0.160530),
        (0, 20, 0.0, 0.161125),
        (1, 29, 0.006113, 0.171755),
        (10, 10, 0.722467, 1.0),
    ],
)
def test_wilson_against_published_values(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=2e-4)


@given(st.integers(1, 5000), st.data())
def test_wilson_against_scipy(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    reference = binomtest(right, n).proportion_ci(method="wilson")
    low, high = wilson_interval(right, n)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert 0 <= low <= right / n <= high <= 1


def test_wilson_of_nothing_and_of_nonsense() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert Score.of(0, 0) == Score(0.0, 0, 0.0, 1.0)
    for right, n in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="impossible"):
            wilson_interval(right, n)


def test_bootstrap_covers_the_true_ratio() -> None:
    generator = random.Random(0)
    covered = 0
    for trial in range(60):
        sizes = np.array([generator.uniform(50, 500) for _ in range(40)])
        bits = sizes * np.array([generator.gauss(1.5, 0.3) for _ in range(40)])
        low, high = bootstrap_ratio(bits, sizes, seed=trial)
        assert low <= bits.sum() / sizes.sum() <= high
        covered += low <= 1.5 <= high
    assert covered >= 50  # 95 % of 60 is 57; below 50 has probability under 1e-3


def test_bootstrap_of_one_window_has_no_width() -> None:
    low, high = bootstrap_ratio(np.array([3.0]), np.array([2.0]))
    assert math.isclose(low, 1.5) and math.isclose(high, 1.5)
