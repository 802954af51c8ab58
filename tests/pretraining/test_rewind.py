"""Going back from a spike: the same bits as a run that knew beforehand what to pass over, also when killed."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.pretraining.training.guard import SKIPPED_NAME
from components.pretraining.training.spike_record import SPIKES_NAME
from tests.pretraining.children import Children
from tests.pretraining.factory import BATCH, CONTEXT, run_config, stage_config
from tests.pretraining.test_guard import weights
from tests.pretraining.test_launcher import run_ranks, write_request
from tests.pretraining.test_training import is_saved, lines, saved

# Three steps of another kind of text, with calm before (long enough for a median) and after.
STEPS = (34, 3, 10)
STAGES = [
    stage_config(tokens=steps * BATCH * CONTEXT, mixture={kind: 1.0})
    for steps, kind in zip(STEPS, ("general", "code", "general"), strict=True)
]


def rewinding(**values: Any) -> dict[str, Any]:
    spiky = {"stages": STAGES, "checkpoint_every_steps": 10, "spike_ratio": 1.2}
    return run_config(**{**spiky, "on_spike": "rewind", "rewind_steps": 4, **values})


def record_of(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / ".work" / SPIKES_NAME).read_text())
    return values


def goes_back(out: Path) -> bool:
    """The rewind is decided, and checkpoints that know nothing of it are still there."""
    path = out / ".work" / SPIKES_NAME
    return path.exists() and record_of(out)["return_to"] is not None


def assert_same_end(out: Path, other: Path) -> None:
    assert lines(out) == lines(other)
    for stage in ("stage1", "stage2", "stage3"):
        assert weights(out, stage) == weights(other, stage)
    assert (out / SKIPPED_NAME).read_bytes() == (other / SKIPPED_NAME).read_bytes()


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory, tokens: Path, children: Children) -> Path:
    """A run that met the spike, went back and ended."""
    out = tmp_path_factory.mktemp("rewound") / "out"
    answer = children.run(tokens, out, rewinding())
    assert answer["metrics"]["steps"] == sum(STEPS)
    spike = record_of(out)
    assert spike["return_to"] is None and spike["stop"] is None
    (entry,) = spike["rewinds"]
    # Checkpoints of steps 30 and 34 were kept: back to 30, and its end is the end of the first stage made again.
    assert (entry["step"], entry["first"], entry["last"]) == (34, 30, 38)
    assert "Resumed from the checkpoint of step 30." in answer["notes"]
    assert [note for note in answer["notes"] if "passed over" in note] == [
        f"Steps 30 to 38 were passed over: the run went back from step 34, where {entry['reason']}."
    ]
    (skipped,) = json.loads((out / SKIPPED_NAME).read_text())
    assert (skipped["step"], skipped["last"], skipped["by"]) == (30, 38, "rewind")
    assert {sequence.partition("@")[0] for sequence in skipped["batch"].split(", ")} == {"code"}
    return out


def test_the_batches_around_the_spike_move_no_weight(rewound: Path) -> None:
    assert weights(rewound, "stage1") == weights(rewound, "stage2") != weights(rewound, "stage3")
    rows = [row["metrics"] for row in lines(rewound) if "train/lr" in row["metrics"]]
    assert sum(row["train/skipped"] for row in rows) == 9


def test_a_run_that_knew_before_ends_in_the_same_bits(
    tmp_path: Path, tokens: Path, children: Children, rewound: Path
) -> None:
    """It never met the spike: what the engine holds after going back is what a fresh one holds."""
    known = tmp_path / "out" / ".work" / SPIKES_NAME
    known.parent.mkdir(parents=True)
    shutil.copy(rewound / ".work" / SPIKES_NAME, known)
    children.run(tokens, tmp_path / "out", rewinding())
    assert_same_end(tmp_path / "out", rewound)


@pytest.mark.parametrize("instant", ["goes back", pytest.param("passes over", marks=pytest.mark.campaign)])
def test_a_kill_while_going_back_changes_nothing(
    tmp_path: Path, tokens: Path, children: Children, rewound: Path, instant: str
) -> None:
    out = tmp_path / "out"
    freeze = partial(goes_back, out) if instant == "goes back" else partial(is_saved, out, 37)
    child = children.start(tokens, out, rewinding(), freeze_when=freeze)
    child.await_frozen()
    child.kill()
    assert saved(out)[-1] == (34 if instant == "goes back" else 37)
    children.run(tokens, out, rewinding())
    assert_same_end(out, rewound)


@pytest.mark.campaign
def test_two_ranks_go_back_alike(tmp_path: Path, tokens: Path, children: Children, rewound: Path) -> None:
    config = rewinding(processes=2, expert_parallel=2, zero_stage=2)
    codes, answer = run_ranks(children, write_request(tmp_path / "out", tokens, config), 2)
    assert codes == [0, 0] and "error" not in answer
    found, wanted = (json.loads((out / SKIPPED_NAME).read_text()) for out in (tmp_path / "out", rewound))
    assert [(entry["step"], entry["last"], entry["batch"]) for entry in found] == [
        (entry["step"], entry["last"], entry["batch"]) for entry in wanted
    ]
    assert weights(tmp_path / "out", "stage1") == weights(tmp_path / "out", "stage2")


@pytest.mark.campaign
def test_a_spike_in_the_first_steps_goes_back_to_the_initial_weights(
    tmp_path: Path, tokens: Path, children: Children
) -> None:
    """Every step would be a spike: the run goes back as often as it may, then stops, and stays stopped."""
    config = rewinding(spike_ratio=1.0001, rewind_steps=5, checkpoint_every_steps=100, max_rewinds=1)
    config["stages"] = [stage_config(tokens=60 * BATCH * CONTEXT, mixture={"general": 1.0}), *STAGES[1:]]
    config["optimizer"] = {**config["optimizer"], "peak_lr": 1e-9}  # the loss only fluctuates
    answer = children.run(tokens, tmp_path / "out", config)
    (entry,) = record_of(tmp_path / "out")["rewinds"]
    assert entry["first"] == entry["step"] - 5 and saved(tmp_path / "out") == [0]
    assert "after 1 rewinds (max_rewinds)" in answer["error"]
    assert children.run(tokens, tmp_path / "out", config)["error"].startswith("This run stopped at step ")
