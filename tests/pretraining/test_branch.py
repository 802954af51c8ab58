"""A run that begins at another one's checkpoint: its weights, rate and mixture, killed, and what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import StageError
from components.pretraining.config import PretrainConfig
from components.pretraining.data.curriculum import Curriculum
from components.pretraining.studies.anneal import anneal_settings, main
from flows.overrides import resolve
from tests.pretraining.children import Children
from tests.pretraining.factory import BATCH, CONTEXT, run_config
from tests.pretraining.test_guard import weights
from tests.pretraining.test_training import flip, is_saved, lines

TOKENS = 9 * BATCH * CONTEXT
MIXTURE = {"maths": 0.75, "code": 0.25}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, tokens: Path, children: Children) -> Path:
    """A run that was killed after step 20."""
    out = tmp_path_factory.mktemp("parent") / "out"
    child = children.start(tokens, out, run_config(), freeze_when=partial(is_saved, out, 20))
    child.await_frozen()
    child.kill()
    return out


def settings(parent: Path, **values: Any) -> dict[str, Any]:
    return {**run_config(), **anneal_settings(parent, 20, TOKENS, MIXTURE, **values)}


def test_the_rate_falls_from_that_of_the_checkpoint(parent: Path) -> None:
    config = PretrainConfig.model_validate(settings(parent))
    rates = [Curriculum(config).learning_rate(step) for step in range(config.total_steps)]
    before = Curriculum(PretrainConfig.model_validate(run_config())).learning_rate(19)
    assert config.total_steps == 9 and config.stages[0].mixture["maths"] == 0.75
    assert rates == pytest.approx([before * (1 - step / 8) for step in range(9)])
    assert config.stages[0].context == CONTEXT  # the second stage's, which step 20 is in


def test_an_anneal_goes_on_from_the_weights(
    tmp_path: Path, tokens: Path, children: Children, parent: Path
) -> None:
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    config = settings(parent)
    out = tmp_path / "out"
    answer = children.run(tokens, out, config)
    assert [note for note in answer["notes"] if "of another run" in note] == [
        f"Began with weights and moments of step 20 of another run: {config['branch']['checkpoint']}."
    ]
    rows = lines(out)
    reached = [row["metrics"] for row in lines(parent) if "train/ce" in row["metrics"]][-1]["train/ce"]
    start = next(row["metrics"]["train/ce"] for row in rows if "train/ce" in row["metrics"])
    fresh = next(row["metrics"]["train/ce"] for row in lines(parent) if "train/ce" in row["metrics"])
    assert abs(start - reached) < 0.3 * (fresh - reached)
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before

    # Killed before and after its own first checkpoint it ends in the same bits.
    again = tmp_path / "again"
    child = children.start(tokens, again, config, freeze_when=partial(is_saved, again, 6))
    child.await_frozen()
    child.kill()
    children.run(tokens, again, config)
    assert lines(again) == rows and weights(again, "stage3") == weights(out, "stage3")


def test_what_is_refused(tmp_path: Path, tokens: Path, children: Children, parent: Path) -> None:
    with pytest.raises(StageError, match="step-00000019 is no checkpoint"):
        anneal_settings(parent, 19, TOKENS, MIXTURE)
    with pytest.raises(StageError, match="--step is 37; the run has checkpoints of steps 1 to 36"):
        anneal_settings(parent, 37, TOKENS, MIXTURE)
    with pytest.raises(StageError, match="is no unfinished run"):
        anneal_settings(tmp_path, 20, TOKENS, MIXTURE)
    copied = tmp_path / "step-00000020"
    shutil.copytree(parent / ".work" / "checkpoints" / "step-00000020", copied)
    config = settings(parent)
    config["branch"] = {**config["branch"], "checkpoint": str(copied)}
    other = {**config, "branch": {**config["branch"], "identity": "0" * 64}}
    answer = children.run(tokens, tmp_path / "out", other)
    assert (
        "cannot begin at the checkpoint" in answer["error"]
        and "another one than the config" in answer["error"]
    )
    flip(next(copied.glob("*optim_states.pt")))
    answer = children.run(tokens, tmp_path / "out", config)
    assert "cannot begin at the checkpoint" in answer["error"] and "SHA-256" in answer["error"]


def test_the_command_prints_what_the_pipeline_takes(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--step", "20", "--tokens", str(TOKENS), "--mixture", "maths=0.75,code=0.25"]
    assert main([str(parent), *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[::2] == ["--set"] * 5
    values = [line for line in printed[1::2] if not line.startswith("pretrain.model=")]  # a tiny vocabulary
    found = resolve("nano", values).pretrain
    assert json.loads(found.branch.model_dump_json())["checkpoint"].endswith("step-00000020")
    assert found.stages[2].mixture["code"] == 0.25 and found.optimizer.decay_share == 1.0
    assert main([str(parent), "--step", "19", *arguments[2:]]) == 2
    assert "is no checkpoint" in capsys.readouterr().err
