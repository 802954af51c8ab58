"""The stage as a whole: SFT raises the held-out score, and ``kill -9`` at any point loses nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from components.artifacts import StageError
from components.posttraining import run
from components.posttraining.stage import trim_metrics
from model import SmallThinkerForCausalLM
from tests.killing import kill_when
from tests.posttraining.conftest import CONFIG, Finished


def read_metrics(out: Path) -> list[tuple[int, dict[str, float]]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["metrics"]) for row in rows]


def test_sft_raises_the_templated_task_clearly(finished: Finished) -> None:
    heldout = json.loads((finished.out / "heldout.json").read_text())
    task = heldout["tasks"]["topic"]
    assert task["sft"]["ci_low"] > task["base"]["ci_high"] and task["gain"]["ci_low"] > 0.2
    assert task["split"] == "dev" and task["base"]["n"] == 30  # half of the sixty items are for testing
    loss = heldout["sft_loss"]
    assert loss["sft"]["nats_per_token"] < 0.5 * loss["base"]["nats_per_token"]
    assert set(loss["sft"]["by_task"]) == {"topic", "arithmetic"}
    assert finished.metrics["topic_gain"] == pytest.approx(task["gain"]["value"])


def test_outputs(finished: Finished) -> None:
    model = SmallThinkerForCausalLM.from_pretrained(finished.out / "model")
    base = SmallThinkerForCausalLM.from_pretrained(finished.inputs.folders["pretrain"] / "stage3")
    tokens = [finished.inputs.tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")]
    assert model.generation_config.eos_token_id == tokens == model.config.eos_token_id
    assert model.config.rope_theta == base.config.rope_theta
    assert (finished.out / "model" / "tokenizer.json").is_file()
    assert (finished.out / "sft.png").read_bytes().startswith(b"\x89PNG")
    middle = SmallThinkerForCausalLM.from_pretrained(finished.out / "checkpoints" / "step-000032")
    name = "model.layers.0.self_attn.q_proj.weight"
    states = [m.state_dict()[name] for m in (base, middle, model)]
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_metrics_have_one_line_per_step(finished: Finished) -> None:
    rows = read_metrics(finished.out)
    assert [step for step, values in rows if "train/loss" in values] == list(range(1, 65))
    assert [step for step, values in rows if "heldout/topic" in values] == [0, 64]


def _state(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for folder in ("model", "checkpoints")
        for path in sorted((out / folder).rglob("*"))
        if path.is_file()
    }


def test_kill_at_any_point_then_rerun_gives_the_same_artefact(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = finished.inputs.context("posttrain", out, CONFIG)
    log = out / "metrics.jsonl"

    def lines() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    kill_when(run, context, lambda: (out / ".work" / "base.json").exists())
    kill_when(run, context, lambda: lines() >= 8)
    kill_when(run, context, lambda: lines() >= 24)
    with log.open("a") as handle:
        handle.write('{"step": 23, "time_s": 1, "metr')  # what a kill within a write leaves
    kill_when(run, context, lambda: (out / "model").exists())
    metrics = run(finished.inputs.context("posttrain", out, CONFIG))
    assert metrics == finished.metrics
    assert _state(out) == _state(finished.out)
    assert json.loads((out / "heldout.json").read_text()) == json.loads(
        (finished.out / "heldout.json").read_text()
    )
    assert [
        (step, {k: v for k, v in values.items() if k != "train/tokens_per_second"})
        for step, values in read_metrics(out)
    ] == [
        (step, {k: v for k, v in values.items() if k != "train/tokens_per_second"})
        for step, values in read_metrics(finished.out)
    ]


def test_trimming_keeps_what_will_not_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert trim_metrics(path, 0) is False
    rows = [(0, "heldout/x"), (5, "train/loss"), (10, "train/loss"), (10, "heldout/x"), (15, "train/loss")]
    text = "".join(json.dumps({"step": s, "time_s": 0, "metrics": {n: 1.0}}) + "\n" for s, n in rows)
    path.write_text(text + '{"step": 20, "ti')
    assert trim_metrics(path, 10) is True
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], *row["metrics"]) for row in kept] == rows[:3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"peak_lr": 7}}, r"posttrain\.peak_lr = 7"),
        ({"config": {"tasks": ["poetry"]}}, "no evaluation set 'poetry'; there are arithmetic, topic"),
        ({"remove": "pretrain/stage3/config.json"}, r"config\.json is missing"),
        ({"remove": "synthesize/sft.jsonl"}, "the stage synthesize writes it"),
        ({"remove": "tokenize/tokenizer"}, "does not hold a readable tokenizer"),
        ({"tear": "pretrain/stage3/model.safetensors"}, "cannot be loaded"),
    ],
)
def test_bad_inputs_give_one_clear_error(
    finished: Finished, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folders = {}
    for role, folder in finished.inputs.folders.items():
        folders[role] = tmp_path / role
        shutil.copytree(folder, folders[role])
    if "remove" in change:
        path = tmp_path / change["remove"]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if "tear" in change:
        path = tmp_path / change["tear"]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    context = finished.inputs.context("posttrain", tmp_path / "out", {**CONFIG, **change.get("config", {})})
    context.inputs = folders
    with pytest.raises(StageError, match=words):
        run(context)
