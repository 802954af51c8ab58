"""Replaying a step: the batch, losses and gradients are those that the run had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from components.artifacts import StageError
from components.pretraining.studies.replay import Replay, main
from tests.pretraining.children import Children
from tests.pretraining.conftest import Finished
from tests.pretraining.factory import BATCH, run_config
from tests.pretraining.test_training import flip, lines


@pytest.fixture(scope="module")
def every_step(tmp_path_factory: pytest.TempPathFactory, tokens: Path, children: Children) -> Path:
    """A run that logs each step and stopped at a spike that never was: a checkpoint right before step 24."""
    out = tmp_path_factory.mktemp("replay") / "out"
    # Micro-batches of three, which leave padding in the last one.
    config = run_config(log_every_steps=1, keep_checkpoints=20, sequences_per_micro_batch=3)
    children.run(tokens, out, config)
    return out


@pytest.mark.parametrize("step", [5, 12, 35])
def test_a_step_right_after_a_checkpoint_has_its_logged_loss_and_norm(every_step: Path, step: int) -> None:
    """Steps of the first and the third stage: other contexts and RoPE bases."""
    replay = Replay(every_step, step)
    assert replay.checkpoint is not None and replay.checkpoint.step == step and replay.complaints == []
    reports = list(replay.sequences())
    (logged,) = (
        row["metrics"]
        for row in lines(every_step)
        if row["step"] == step + 1 and "train/ce" in row["metrics"]
    )
    assert len(reports) == (BATCH if step < 24 else BATCH // 2)
    losses = [report.loss for report in reports]
    assert sum(losses) / len(losses) == pytest.approx(logged["train/ce"], rel=1e-6)
    norms = replay.gradient_norms()
    assert norms["total"] == pytest.approx(logged["train/grad_norm"], rel=1e-5)
    assert set(norms) == {"layer00", "layer01", "model.embed_tokens", "model.norm", "total"}
    for report in reports:
        assert report.largest >= report.loss and report.first_token >= 0 and len(report.text) > 10


def test_the_command_prints_a_line_per_sequence_and_layer(
    every_step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(every_step, out)
    flip(next((out / ".work" / "checkpoints" / "step-00000020").glob("zero_pp*")))
    assert main([str(out), "--step", "21"]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["row"] for row in rows[:BATCH]] == list(range(BATCH))
    assert rows[-1]["parameters"] == "total" and rows[-1]["gradient_norm"] > 0
    assert "weights of step 15, batch of step 21" in printed.err and "Passed over a damaged" in printed.err
    words = {"species", "plant", "user", "number", "river", "def", "theorem", "question"}
    assert any(word in row["text"] for row in rows[:BATCH] for word in words)


def test_what_cannot_be_replayed_is_said(every_step: Path, whole: Finished, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="is no unfinished run"):
        Replay(tmp_path, 3)
    with pytest.raises(StageError, match="steps 0 to 35"):
        Replay(every_step, 36)
    with pytest.raises(StageError, match="No whole checkpoint at or before step 3"):
        Replay(whole.out, 3)
