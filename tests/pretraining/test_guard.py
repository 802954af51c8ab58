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
from components.pretraining.training.guard import SKIPPED_NAME, Limits, LossGuard
from components.pretraining.training.spike_record import SPIKES_NAME
from tests.pretraining.children import Children
from tests.pretraining.factory import BATCH, CONTEXT, run_config, stage_config
from tests.pretraining.test_training import is_saved, lines, logged, saved


def calm_guard(steps: int, **values: Any) -> LossGuard:
    guard = LossGuard(Limits(ratio=1.5, **values))
    for _ in range(steps):
        assert guard.judge(2.0, 1.0) is None
        guard.accept(2.0, 1.0)
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
        assert "replay FOLDER --step 41" in message and "set on_spike to skip or rewind" in message


def test_spikes_are_judged_by_the_recent_median() -> None:
    complaint = calm_guard(32).judge(3.001, 1.0)
    assert complaint == "the loss jumped to 3.001, more than 1.5 times the recent median of 2"
    assert calm_guard(32).judge(3.0, 1.0) is None  # at the ratio: allowed
    assert calm_guard(31).judge(1e9, 1.0) is None  # too few losses to judge
    guard = calm_guard(64)
    guard.accept(100.0, 1.0)  # one outlier does not move the median
    assert guard.judge(3.001, 1.0) is not None
    for _ in range(200):
        guard.accept(10.0, 4.0)
    resumed = LossGuard(Limits(ratio=1.5))
    resumed.load_state(json.loads(json.dumps(guard.to_state())))
    for one in (guard, resumed):
        assert one.judge(14.9, 1.0) is None and one.judge(15.1, 1.0) is not None
        assert one.judge(10.0, 39.9) is None and one.judge(10.0, 40.1) is not None
        assert len(one.recent) == len(one.recent_norms) == 64  # what a checkpoint holds stays small


def test_norms_are_judged_by_their_own_median() -> None:
    complaint = calm_guard(32).judge(2.0, 10.01)
    assert complaint == "the gradient's norm jumped to 10.01, more than 10 times the recent median of 1"
    assert calm_guard(32).judge(2.0, 10.0) is None  # at the ratio: allowed
    assert calm_guard(31).judge(2.0, 1e9) is None  # too few to judge
    assert calm_guard(32, grad_ratio=3.0).judge(2.0, 3.1) is not None
    guard = calm_guard(32)
    for norm in (1e30, 1e30):  # a spike that is skipped does not move the median
        assert guard.judge(2.0, norm) is not None
    assert guard.judge(2.0, 10.01) is not None


def test_only_so_many_steps_are_skipped_among_a_thousand() -> None:
    guard = calm_guard(32, policy="skip", max_skips=2, max_skips_per_1000=3)
    for step in (100, 400, 1090):  # never two in a row
        guard.refuse(step, "the loss is nan", "code@7")
        guard.accept(2.0, 1.0)
    with pytest.raises(
        StageError, match=r"step 1099: .* after 3 skipped among the last 1,000 steps \(max_skips_per_1000\)"
    ):
        guard.refuse(1099, "the loss is nan", "code@7")
    guard.refuse(1100, "the loss is nan", "code@7")  # step 100 is a thousand steps ago


def test_only_so_many_steps_are_skipped_in_a_row(tmp_path: Path) -> None:
    guard = calm_guard(32, policy="skip", max_skips=2)
    guard.write(tmp_path)
    assert not (tmp_path / SKIPPED_NAME).exists()
    for step in (32, 33):
        guard.refuse(step, "the loss is nan", "code@7")
    guard.accept(2.0, 1.0)
    for step in (35, 36):
        guard.refuse(step, "the loss is nan", "code@7")
    resumed = LossGuard(Limits("skip", 1.5, max_skips=2))
    resumed.load_state(json.loads(json.dumps(guard.to_state())))
    for same in (guard, resumed):
        with pytest.raises(StageError, match=r"step 37: .* after 2 steps skipped in a row \(max_skips\)"):
            same.refuse(37, "the loss is nan", "code@7")
        same.write(tmp_path)
        written = json.loads((tmp_path / SKIPPED_NAME).read_text())
        assert [entry["step"] for entry in written] == [32, 33, 35, 36]
        assert written[0] == {
            "step": 32, "last": 32, "reason": "the loss is nan", "batch": "code@7", "by": "skip",
        }  # fmt: skip


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

    # The next job of the queue does not train its way to the same step: it says at once what to do.
    before = lines(out)
    answer = children.run(tokens, out, run_config(**SPIKY))
    assert answer["error"].startswith(
        "This run stopped at step 34 and would do so again: the loss jumped to "
    )
    assert (
        "Set on_spike to skip or rewind" in answer["error"]
        and str(out / ".work" / SPIKES_NAME) in answer["error"]
    )
    assert lines(out) == before and saved(out) == [17, 34] and answer["notes"] == []

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


def test_a_spike_of_the_norm_alone_and_too_many_in_a_row(
    tmp_path: Path, tokens: Path, children: Children
) -> None:
    norms = {**SPIKY, "spike_ratio": 100.0, "grad_spike_ratio": 1.5}
    config = run_config(**norms, on_spike="skip", max_skips=2)
    answer = children.run(tokens, tmp_path / "out", config)
    assert "Training stopped at step 36: the gradient's norm jumped to " in answer["error"]
    assert "after 2 steps skipped in a row (max_skips)" in answer["error"]
    answer = children.run(tokens, tmp_path / "out", config)
    assert answer["error"].startswith(
        "This run stopped at step 36 and would do so again: the gradient's norm "
    )
    answer = children.run(tokens, tmp_path / "out", {**config, "max_skips": 3})
    assert [entry["step"] for entry in json.loads((tmp_path / "out" / SKIPPED_NAME).read_text())] == [
        34,
        35,
        36,
    ]


def test_another_context_begins_without_the_medians_of_the_one_before() -> None:
    """Another context and RoPE base: smoke's first step there has a norm 40 times the one before, in bf16."""
    guard = calm_guard(64)
    assert guard.judge(2.0, 40.0) is not None and guard.judge(4.0, 1.0) is not None
    guard.begin_training_stage()
    assert guard.judge(4.0, 40.0) is None
    assert guard.judge(math.nan, 1.0) is not None  # what is never usual
    for _ in range(32):
        guard.accept(4.0, 40.0)
    assert guard.judge(4.0, 500.0) is not None and guard.judge(4.0, 41.0) is None
