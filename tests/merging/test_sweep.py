"""The sweep: the documented rule picks, on development items alone, and a killed sweep goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from components.artifacts import StageError
from components.corpus.dialogues import DialogueEncoder
from components.measures.task_suite import Gain, TaskScore, TaskSuite
from components.merging import run
from components.merging.config import MergeConfig
from components.merging.sweep import Scored, checkpoint_folder, choose, utilities
from components.weights.model_folders import save_model
from model import SmallThinkerForCausalLM
from tests.killing import kill_when
from tests.posttraining.factory import Inputs, make_inputs, small_model

CONFIG: dict[str, Any] = {
    "candidates": [
        {"sft": 1.0},
        {"sft": 0.5, "stage3": 0.5},
        {"stage3": 1.0},
        {"sft": 0.7, "stage2": 0.3},
        {"sft": 0.5, "sft-mid": 0.5},
    ],
    "task_items": 20,
    "text_tokens_per_category": 128,
    "context": 64,
    "threads": 1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("merge")
    made = make_inputs(root, dialogues=20)
    tokenizer_folder = made.folders["tokenize"] / "tokenizer"
    encoder = DialogueEncoder.open(tokenizer_folder)
    for number, name in enumerate(("model", "checkpoints/step-000007", "checkpoints/step-000009")):
        model = small_model(10 + number, rope_theta=1.5e6)
        save_model(model, encoder, tokenizer_folder, root / "posttrain" / name, root)
    made.folders["posttrain"] = root / "posttrain"
    return made


def scored(score: float, bits: float) -> Scored:
    right = tuple(index < round(score * 100) for index in range(100))
    return Scored({"x": 1.0}, {"t": TaskScore(right, 1.0, 0.25)}, {"overall": bits})


def test_the_rule() -> None:
    sweep = [scored(0.50, 2.0), scored(0.60, 2.1), scored(0.70, 3.0)]
    assert utilities(sweep, 1.0) == pytest.approx([0.5, 0.6 - 0.05, 0.7 - 0.5])
    assert [choose(sweep, weight) for weight in (0.0, 1.0, 5.0)] == [2, 1, 0]
    assert (
        choose([scored(0.5, 2.0), scored(0.5, 1.9), scored(0.5, 1.9)], 0.0) == 1
    )  # ties: fewer bits, then first


def test_scores_survive_json() -> None:
    before = scored(0.37, 1.5)
    assert Scored.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_gain_is_paired() -> None:
    before, after = scored(0.30, 1.0).tasks["t"], scored(0.40, 1.0).tasks["t"]
    gain = Gain.between(before, after)
    assert gain.value == pytest.approx(0.10) and 0.04 < gain.ci_low < gain.ci_high < 0.16
    assert Gain.between(before, before) == Gain(0.0, 0.0, 0.0)


def test_only_development_items_are_read(inputs: Inputs) -> None:
    suite = TaskSuite.open(inputs.folders["evalsets"], ["topic", "arithmetic"], 1000)
    assert {row["split"] for rows in suite.rows.values() for row in rows} == {"dev"}


def test_generated_answers_are_compared_exactly(inputs: Inputs) -> None:
    encoder = DialogueEncoder.open(inputs.folders["tokenize"] / "tokenizer")
    rows = TaskSuite.open(inputs.folders["evalsets"], ["arithmetic"], 4).rows
    model = small_model().train(False)
    score = TaskSuite(rows).score(model, encoder)["arithmetic"]
    assert score.right == (False,) * 4 and score.answer_nats > 1
    # A model that always says what it just learned by heart is right exactly where that is the answer.
    row = rows["arithmetic"][0]
    prompt = encoder.encode_prompt([{"role": "user", "content": row["question"]}])
    ids = torch.tensor([prompt + encoder.encode_answer(row["answer"])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = TaskSuite(rows).score(model, encoder)["arithmetic"].right
    assert right[0] and right == tuple(item["answer"] == row["answer"] for item in rows["arithmetic"])


def test_sweep_writes_the_chosen_merge(inputs: Inputs, tmp_path: Path) -> None:
    metrics = run(inputs.context("merge", tmp_path, CONFIG))
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["weights"] for entry in sweep["candidates"]] == CONFIG["candidates"]
    best = max(entry["utility"] for entry in sweep["candidates"])
    chosen = sweep["candidates"][sweep["chosen"]]
    assert chosen["utility"] == best == metrics["utility"] and sweep["split"] == "dev"
    total = sum(chosen["weights"].values())
    sources = {
        name: load_file(checkpoint_folder(name, *_parents(inputs)) / "model.safetensors")
        for name in chosen["weights"]
    }
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        mean = sum(w / total * sources[part][name].double() for part, w in chosen["weights"].items())
        torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=1e-6)
    model = SmallThinkerForCausalLM.from_pretrained(tmp_path / "model")
    stops = [inputs.tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")]
    assert model.generation_config.eos_token_id == stops == model.config.eos_token_id
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def _parents(inputs: Inputs) -> tuple[Path, Path]:
    return inputs.folders["pretrain"], inputs.folders["posttrain"]


def test_kill_and_rerun_gives_the_same_artefact(inputs: Inputs, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(inputs.context("merge", whole, CONFIG))
    context = inputs.context("merge", killed, CONFIG)
    work = killed / ".work"
    kill_when(run, context, lambda: (work / "candidate" / "model.safetensors").exists())
    kill_when(run, context, lambda: (work / "candidate-002.json").exists())
    kill_when(run, context, lambda: (work / "model").exists() or (killed / "model").exists())
    run(inputs.context("merge", killed, CONFIG))
    for name in (
        "sweep.json",
        "model/model.safetensors",
        "model/config.json",
        "model/generation_config.json",
    ):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_an_unknown_checkpoint_lists_those_there_are(inputs: Inputs, tmp_path: Path) -> None:
    config = {**CONFIG, "candidates": [{"stage9": 1.0}]}
    with pytest.raises(
        StageError, match=r"'stage9'; there are stage1, .*sft, sft-mid, step-000007, step-000009"
    ):
        run(inputs.context("merge", tmp_path, config))


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([], "at least 1 item"),
        ([{}], "names no checkpoint"),
        ([{"sft": -1.0}], "sft has the weight -1.0"),
        ([{"sft": float("nan")}], "sft has the weight nan"),
        ([{"sft": 0.0}], "sum to 0"),
    ],
)
def test_wrong_candidates_are_named(candidates: list[dict[str, float]], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MergeConfig.model_validate({"candidates": candidates})
