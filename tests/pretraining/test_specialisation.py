"""Specialisation of experts: the measure, the variants, and the picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.pretraining.studies.specialisation import (
    VARIANTS,
    draw,
    mutual_information_bits,
    specialisation_bits,
    table,
    variant_config,
)


def test_known_values() -> None:
    alike = np.array([[1.5, 0.25, 0.25]] * 4)
    assert mutual_information_bits(alike) == pytest.approx(0.0, abs=1e-12)
    own = 2.0 * np.eye(4)  # every domain has an expert of its own
    assert mutual_information_bits(own) == pytest.approx(2.0)
    halves = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=float)
    assert mutual_information_bits(halves) == pytest.approx(1.0)
    by_category = {"maths": [[1, 1, 0, 0], [1, 1, 1, 1]], "code": [[0, 0, 1, 1], [1, 1, 1, 1]]}
    assert specialisation_bits(by_category) == pytest.approx(0.5)  # the mean of one layer's 1 and another's 0


@given(st.lists(st.lists(st.floats(0.01, 10), min_size=5, max_size=5), min_size=2, max_size=6))
def test_bounds(rows: list[list[float]]) -> None:
    bits = mutual_information_bits(np.array(rows))
    assert -1e-9 <= bits <= math.log2(len(rows)) + 1e-9


def test_variants_differ_only_in_the_balance() -> None:
    configs = [variant_config(values, 90_000, 0.03).model_dump() for values in VARIANTS.values()]
    for config in configs[1:]:
        changed = {key for key in config if config[key] != configs[0][key]}
        assert changed and all(key.startswith("load_balance") for key in changed)
    assert len({config["load_balance_coef"] for config in configs}) == 2  # one without the loss


def test_the_picture_and_the_table(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    result: dict[str, Any] = {
        "bits_per_byte": 2.5,
        "specialisation_bits": 0.25,
        "load_max": 1.5,
        "load_max_group": 1.75,
        "by_category": {name: generator.random((6, 8)).tolist() for name in ("maths", "code")},
    }
    draw({"one": result, "other": result}, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert table({"one": result}).splitlines()[1].split() == [
        "one",
        "2.5000",
        "0.2500",
        "bits",
        "1.50",
        "1.75",
    ]
