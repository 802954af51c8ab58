"""One hundred steps against the losses that are kept in ``tests/golden/pretraining/losses.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pretraining.children import Children
from tests.pretraining.golden_losses import (
    GOLDEN,
    NAMES,
    STAGE_STEPS,
    data_digest,
    golden_config,
    logged_losses,
)
from tests.pretraining.test_launcher import run_ranks, write_request

# Other instruction sets (plain, AVX2, AVX-512) move losses by up to 9e-8 of themselves and gradient norms by 9e-7.
TOLERANCE = 1e-5


def assert_golden(tokens: Path, out: Path) -> None:
    golden: dict[str, Any] = json.loads(GOLDEN.read_text())
    assert data_digest(tokens) == golden["tokens_sha256"], "the tests' tokens changed, so losses must differ"
    found = logged_losses(out)
    for name in NAMES:
        assert len(golden["losses"][name]) == len(found[name]) == sum(STAGE_STEPS)
        for step, (value, wanted) in enumerate(zip(found[name], golden["losses"][name], strict=True)):
            assert value == pytest.approx(wanted, rel=TOLERANCE), (name, step)


def test_one_process_gives_the_golden_losses(tmp_path: Path, tokens: Path, children: Children) -> None:
    children.run(tokens, tmp_path / "out", golden_config())
    assert_golden(tokens, tmp_path / "out")


def test_two_processes_with_shared_experts_give_the_golden_losses(
    tmp_path: Path, tokens: Path, children: Children
) -> None:
    config = golden_config(processes=2, expert_parallel=2, zero_stage=2)
    codes, answer = run_ranks(children, write_request(tmp_path / "out", tokens, config), 2)
    assert codes == [0, 0] and "error" not in answer
    assert_golden(tokens, tmp_path / "out")


@pytest.mark.campaign
def test_a_slightly_different_optimizer_would_be_noticed(
    tmp_path: Path, tokens: Path, children: Children
) -> None:
    """The tolerance is far below what a small change of the training does."""
    config = golden_config()
    config["optimizer"] = {**config["optimizer"], "beta2": 0.951}
    children.run(tokens, tmp_path / "out", config)
    with pytest.raises(AssertionError, match=r"train/ce|'train/ce'"):
        assert_golden(tokens, tmp_path / "out")
