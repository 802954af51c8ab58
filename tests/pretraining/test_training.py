"""The stage end to end: killed, stopped and damaged runs end in the bytes of an undisturbed one."""

from __future__ import annotations

import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from components.corpus.shards import TokenShards
from components.measures.heldout import HeldOut
from model import SmallThinkerForCausalLM
from tests.pretraining.children import Children
from tests.pretraining.conftest import Finished
from tests.pretraining.factory import BATCH, CONTEXT, MODEL, STEPS, run_config

NOISE = ("speed/", "memory/")


def lines(out: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what the clock and the machine decide."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("time_s") > 0
        row["metrics"] = {key: value for key, value in row["metrics"].items() if not key.startswith(NOISE)}
    return rows


def assert_same_result(out: Path, whole: Finished) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        files = sorted(path.name for path in (whole.out / stage).iterdir())
        assert sorted(path.name for path in (out / stage).iterdir()) == files and "model.safetensors" in files
        for name in files:
            assert (out / stage / name).read_bytes() == (whole.out / stage / name).read_bytes(), (stage, name)
    assert lines(out) == lines(whole.out)
    for name in ("heldout.json", "activation_stats.json"):
        assert (out / name).read_bytes() == (whole.out / name).read_bytes()


def logged(out: Path) -> int:
    """Step of the newest whole training line."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return 0
    found = re.findall(rb'^\{"step": (\d+), [^\n]*"train/ce"[^\n]*\n', path.read_bytes(), re.MULTILINE)
    return int(found[-1]) if found else 0


def saved(out: Path) -> list[int]:
    """Steps of the visible checkpoints."""
    folder = out / ".work" / "checkpoints"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*[0-9]"))


def drafts(out: Path) -> list[int]:
    """Steps of the checkpoints that are being written."""
    folder = out / ".work" / "checkpoints"
    return [int(path.name.removeprefix(".step-")) for path in folder.glob(".step-*")]


# --- instants, for runs that stop themselves ---


def ahead_of_its_checkpoint(out: Path) -> bool:
    return 5 in saved(out) and logged(out) > max(saved(out)) and not drafts(out)


def saving_after(out: Path, step: int) -> bool:
    return any(draft > step for draft in drafts(out))


def any_folder(paths: list[Path]) -> bool:
    return any(path.is_dir() for path in paths)


def logged_at_least(out: Path, step: int) -> bool:
    return logged(out) >= step


def is_saved(out: Path, step: int) -> bool:
    return step in saved(out)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_an_undisturbed_run(whole: Finished) -> None:
    rows = lines(whole.out)
    training = [row for row in rows if "train/ce" in row["metrics"]]
    # Every third step and each stage's end; evaluations at both ends of each stage.
    assert [row["step"] for row in training] == [*range(3, STEPS + 1, 3)]
    others = [
        (row["step"], next(iter(row["metrics"])).partition("/")[0]) for row in rows if row not in training
    ]
    assert others == [(0, "heldout_start"), *[(12, "heldout"), (12, "heldout_start")],
                      *[(24, "heldout"), (24, "heldout_start")], (36, "heldout")]  # fmt: skip
    losses = [row["metrics"]["train/ce"] for row in training]
    assert losses[0] > 5.0 and losses[-1] < 0.75 * losses[0]
    assert training[-1]["metrics"]["train/lr"] == 0.1 * 1e-2
    assert [row["metrics"]["train/tokens"] for row in training] == [
        3 * BATCH * CONTEXT * i for i in range(1, 13)
    ]
    heldout = json.loads((whole.out / "heldout.json").read_text())
    assert heldout["start"]["stage1"]["overall"] > heldout["stage1"]["overall"] > heldout["stage2"]["overall"]
    metrics = whole.answer["metrics"]
    assert metrics["heldout_bits_per_byte_stage3"] == heldout["stage3"]["overall"]
    assert (metrics["steps"], metrics["tokens"]) == (STEPS, STEPS * BATCH * CONTEXT)
    assert saved(whole.out) == [35, 36]
    notes = " ".join(whole.answer["notes"])
    assert "lack chinese; stage1's" in notes and "lacks code: trained on, not measured" in notes
    for name in ("loss.png", "bits_per_byte.png"):
        assert (whole.out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("stage", "theta"), [("stage1", 1e5), ("stage2", 1e5), ("stage3", 1.5e6)])
def test_exported_folders(whole: Finished, tokens: Path, stage: str, theta: float) -> None:
    config = json.loads((whole.out / stage / "config.json").read_text())
    assert config["rope_theta"] == theta and config["vocab_size"] == MODEL["vocab_size"]
    copied = (whole.out / stage / "tokenizer.json").read_bytes()
    assert copied == (tokens / "tokenizer" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("stage", "context"), [("stage1", CONTEXT), ("stage2", CONTEXT), ("stage3", 2 * CONTEXT)]
)
def test_an_exported_model_has_the_bits_per_byte_that_were_measured(
    whole: Finished, tokens: Path, stage: str, context: int
) -> None:
    """Only so when the stage was evaluated at the RoPE base that its file states, with the exported weights."""
    model = SmallThinkerForCausalLM.from_pretrained(whole.out / stage)
    heldout = HeldOut.open(
        TokenShards.open(tokens),
        whole.out / stage / "tokenizer.json",
        run_config()["evaluation"]["tokens_per_category"],
    )
    scores = heldout.evaluate(model, context, torch.device("cpu"))
    assert scores is not None
    stated = json.loads((whole.out / "heldout.json").read_text())[stage]
    assert scores.bits_per_byte == pytest.approx(stated, rel=1e-6)


def test_three_kills_leave_no_trace(
    tmp_path: Path, tokens: Path, children: Children, whole: Finished
) -> None:
    out, config = tmp_path / "out", run_config()

    # Between two checkpoints: lines were logged that the resumed run will log again.
    child = children.start(tokens, out, config, freeze_when=partial(ahead_of_its_checkpoint, out))
    child.await_frozen()
    child.kill()
    first, ahead = max(saved(out)), logged(out)
    assert 5 <= first < ahead
    torn = (out / "metrics.jsonl").read_bytes() + b'{"step": 99, "time_s": 1.0, "metr'
    (out / "metrics.jsonl").write_bytes(torn)  # as a kill in the middle of a write leaves it

    # While a checkpoint is being saved.
    child = children.start(tokens, out, config, freeze_when=partial(saving_after, out, 12))
    child.await_frozen()
    child.kill()
    (draft,) = drafts(out)
    second = max(saved(out))
    assert second < draft and draft not in saved(out)

    # While a finished stage is being exported.
    exports = [out / ".work" / f"export-stage{number}" for number in (2, 3)]
    child = children.start(tokens, out, config, freeze_when=partial(any_folder, exports))
    child.await_frozen()
    child.kill()
    stage = 2 if exports[0].is_dir() else 3
    assert not (out / f"stage{stage}").exists() and max(saved(out)) == 12 * stage

    answer = children.run(tokens, out, config)
    assert f"Resumed from the checkpoint of step {12 * stage}." in answer["notes"]
    assert answer["metrics"] == whole.answer["metrics"]
    assert_same_result(out, whole)
    assert drafts(out) == [] and saved(out) == [35, 36]


def test_sigterm_saves_and_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, tokens: Path, children: Children, whole: Finished
) -> None:
    out, config = tmp_path / "out", run_config()
    steps: list[int] = []
    for at_least in (6, 18):
        child = children.start(tokens, out, config, freeze_when=partial(logged_at_least, out, at_least))
        child.await_frozen()
        child.signal(signal.SIGTERM)
        child.signal(signal.SIGCONT)
        answer = child.end()
        assert answer["type"] == "TrainingInterrupted"
        match = re.fullmatch(
            rf"Stopped by SIGTERM at step (\d+) of {STEPS}; everything up to there is saved, and the same command "
            r"goes on from it\.",
            answer["error"],
        )
        assert match is not None, answer["error"]
        if steps:
            assert f"Resumed from the checkpoint of step {steps[-1]}." in answer["notes"]
        steps.append(int(match.group(1)))
        assert at_least <= steps[-1] < STEPS and max(saved(out)) == steps[-1]
    before, newest = saved(out)
    assert newest == steps[-1]
    damaged = out / ".work" / "checkpoints" / f"step-{newest:08d}" / "mp_rank_00_model_states.pt"
    flip(damaged)
    answer = children.run(tokens, out, config)
    complaint = f"step-{newest:08d}/{damaged.name} does not match its SHA-256"
    assert f"Passed over a damaged checkpoint: {complaint}." in answer["notes"]
    assert f"Resumed from the checkpoint of step {before}." in answer["notes"]
    assert_same_result(out, whole)


@pytest.mark.parametrize(
    ("damaged", "resumed"),
    [
        pytest.param((), 36, marks=pytest.mark.campaign),
        pytest.param((36,), 35, marks=pytest.mark.campaign),
        ((35, 36), None),
    ],
)
def test_a_finished_run_with_damaged_checkpoints_is_made_again(
    tmp_path: Path,
    tokens: Path,
    children: Children,
    whole: Finished,
    damaged: tuple[int, ...],
    resumed: int | None,
) -> None:
    """The evaluations beyond the checkpoint are known already; their lines must not be lost with it."""
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    for step in damaged:
        flip(next((out / ".work" / "checkpoints" / f"step-{step:08d}").glob("zero_pp*")))
    answer = children.run(tokens, out, run_config())
    notes = [note for note in answer["notes"] if note.startswith("Resumed")]
    assert notes == ([f"Resumed from the checkpoint of step {resumed}."] if resumed else [])
    assert_same_result(out, whole)


def test_a_truncated_shard_is_named(tmp_path: Path, tokens: Path, children: Children) -> None:
    shutil.copytree(tokens, tmp_path / "tokens")
    name = "shards/train/maths/00001.ds"
    path = tmp_path / "tokens" / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    answer = children.run(tmp_path / "tokens", tmp_path / "out", run_config())
    assert answer["error"] == f"the token shard {name} is truncated: {size - 3} bytes, expected {size}"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tokens: Path, children: Children) -> None:
    model = {"preset": "nano", "overrides": {**MODEL, "initializer_range": 1e30}}
    answer = children.run(tokens, tmp_path / "out", run_config(model=model))
    assert re.match(
        r"Training stopped at step 0: the loss is (nan|inf)\. Earlier checkpoints", answer["error"]
    )
    batch = answer["error"].partition("(category@first token): ")[2].split(", ")
    assert len(batch) == BATCH and all(re.fullmatch(r"[a-z_]+@\d+", sequence) for sequence in batch)
    assert saved(tmp_path / "out") == []
