"""The loss guard: what it complains about, when it stops, and runs that go on without the step."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import StageError
from components.pretraining.training.guard import SKIPPED_NAME, LossGuard
from tests.pretraining.children import Children
from tests.pretraining.factory import BATCH, CONTEXT, run_config, stage_config
from tests.pretraining.test_training import is_saved, lines, logged, saved


def calm_guard(steps: int, **values: Any) -> LossGuard:
    guard = LossGuard(1.5, **values)
    for _ in range(steps):
        assert guard.judge(2.0, 1.0) is None
        guard.accept(2.0)
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (-math.inf, 1.0, "the loss is -inf"),
        (2.0, math.nan, "the gradient's norm is nan"),
        (2.0, math.inf, "the gradient's norm is inf"),
    ],
)
def test_values_that_are_not_finite(loss: float, norm: float, words: str) -> None:
    for guard in (calm_guard(0), calm_guard(64)):
        complaint = guard.judge(loss, norm)
        assert complaint == words
        with pytest.raises(StageError) as caught:
            guard.refuse(41, complaint, "maths@128, code@7")
        message = str(caught.value)
        assert f"step 41: {words}." in message and message.endswith("maths@128, code@7")
        assert "replay FOLDER --step 41" in message


def test_spikes_are_judged_by_the_recent_median() -> None:
    complaint = calm_guard(32).judge(3.001, 1.0)
    assert complaint == "the loss jumped to 3.001, more than 1.5 times the recent median of 2"
    assert calm_guard(32).judge(3.0, 1.0) is None  # at the ratio: allowed
    assert calm_guard(31).judge(1e9, 1.0) is None  # too few losses to judge
    guard = calm_guard(64)
    guard.accept(100.0)  # one outlier does not move the median
    assert guard.judge(3.001, 1.0) is not None
    for _ in range(200):
        guard.accept(10.0)
    assert guard.judge(14.9, 1.0) is None and guard.judge(15.1, 1.0) is not None
    assert len(guard.recent) == 64  # what a checkpoint holds stays small
    resumed = LossGuard(1.5)
    resumed.load_state(json.loads(json.dumps(guard.to_state())))
    assert resumed.judge(14.9, 1.0) is None and resumed.judge(15.1, 1.0) is not None


def test_only_so_many_steps_are_skipped_in_a_row(tmp_path: Path) -> None:
    guard = calm_guard(32, policy="skip", max_skips=2)
    guard.write(tmp_path)
    assert not (tmp_path / SKIPPED_NAME).exists()
    for step in (32, 33):
        guard.refuse(step, "the loss is nan", "code@7")
    guard.accept(2.0)
    for step in (35, 36):
        guard.refuse(step, "the loss is nan", "code@7")
    resumed = LossGuard(1.5, "skip", 2)
    resumed.load_state(json.loads(json.dumps(guard.to_state())))
    for same in (guard, resumed):
        with pytest.raises(StageError, match=r"step 37: .* after 2 steps skipped in a row \(max_skips\)"):
            same.refuse(37, "the loss is nan", "code@7")
        same.write(tmp_path)
        written = json.loads((tmp_path / SKIPPED_NAME).read_text())
        assert [entry["step"] for entry in written] == [32, 33, 35, 36]
        assert written[0] == {"step": 32, "reason": "the loss is nan", "batch": "code@7"}


# Thirty-four steps of one kind of text, then three of another kind, then the first kind again would be calm: with a
# low ratio each of the three is a spike.
CALM = stage_config(tokens=17 * BATCH * CONTEXT, mixture={"general": 1.0})
OTHER = stage_config(tokens=3 * BATCH * CONTEXT, mixture={"code": 1.0})
SPIKY: dict[str, Any] = {"stages": [CALM, CALM, OTHER], "checkpoint_every_steps": 35, "spike_ratio": 1.2}


def weights(out: Path, stage: str) -> bytes:
    return (out / stage / "model.safetensors").read_bytes()


def test_spikes_are_skipped_and_a_resumed_run_skips_the_same(
    tmp_path: Path, tokens: Path, children: Children
) -> None:
    out = tmp_path / "out"
    answer = children.run(tokens, out, run_config(**SPIKY))
    assert "Training stopped at step 34: the loss jumped to " in answer["error"]
    assert "more than 1.2 times the recent median" in answer["error"]
    batch = answer["error"].partition("(category@first token): ")[2].split(", ")
    assert len(batch) == BATCH and {sequence.partition("@")[0] for sequence in batch} == {"code"}
    assert saved(out) == [17, 34] and not (out / SKIPPED_NAME).exists()
    stopped = tmp_path / "stopped"
    shutil.copytree(out, stopped)

    # The policy is no part of what the run is: it goes on from where it stopped.
    answer = children.run(tokens, out, run_config(**SPIKY, on_spike="skip"))
    assert "Resumed from the checkpoint of step 34." in answer["notes"]
    skipped = json.loads((out / SKIPPED_NAME).read_text())
    assert [entry["step"] for entry in skipped] == [34, 35, 36]
    assert skipped[0]["batch"] == ", ".join(batch)
    assert [note for note in answer["notes"] if "was skipped" in note] == [
        f"Step {entry['step']} was skipped: {entry['reason']}." for entry in skipped
    ]
    training = [row["metrics"] for row in lines(out) if "train/lr" in row["metrics"]]
    assert [row["train/skipped"] for row in training if row["train/skipped"]] == [2.0, 1.0]
    assert "train/ce" not in training[-1] and "train/ce" not in training[-2] and "train/ce" in training[-3]
    assert weights(out, "stage3") == weights(out, "stage2"), "a skipped step must not move a weight"

    # Killed after the first skip, and again a skip between checkpoint and kill.
    skipping = run_config(**SPIKY, on_spike="skip")
    child = children.start(tokens, stopped, skipping, freeze_when=partial(is_saved, stopped, 35))
    child.await_frozen()
    child.kill()
    assert logged(stopped) <= 34
    answer = children.run(tokens, stopped, run_config(**SPIKY, on_spike="skip"))
    assert json.loads((stopped / SKIPPED_NAME).read_text()) == skipped
    assert lines(stopped) == lines(out) and weights(stopped, "stage3") == weights(out, "stage3")

    # A raised ratio lets the steps be taken.
    answer = children.run(tokens, tmp_path / "taken", run_config(**{**SPIKY, "spike_ratio": 100.0}))
    assert answer["metrics"]["steps"] == 37
    assert weights(tmp_path / "taken", "stage3") != weights(tmp_path / "taken", "stage2")


@pytest.mark.campaign
def test_too_many_spikes_in_a_row_stop_the_run(tmp_path: Path, tokens: Path, children: Children) -> None:
    answer = children.run(tokens, tmp_path / "out", run_config(**SPIKY, on_spike="skip", max_skips=2))
    assert "Training stopped at step 36: the loss jumped" in answer["error"]
    assert "after 2 steps skipped in a row (max_skips)" in answer["error"]
