"""The stage ``evaluate`` end to end on tiny random models, against lm-eval's own HFLM and plain arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from components.artifacts import StageContext, StageError, write_json
from components.evaluation import run
from components.evaluation import harness
from components.evaluation.activations import HeldOutText, measure
from components.evaluation.config import EvaluateConfig
from components.evaluation.language_model import SharedPrefixLM
from components.evaluation.lm_eval_tasks import write_tasks
from components.evaluation.sandbox import probe
from components.evaluation.sets import EvalSet, write_sets
from components.evaluation.stage import MODELS
from tests.evaluation.tiny import save_tiny, tiny_model, tiny_tokenizer, write_shards
from tests.waiting import CEILING_S

TEXTS = {
    "general": ["The cat sat on the mat. " * 4, "A short one."],
    "chinese": ["春眠不觉晓，处处闻啼鸟。", "x"],
}
CONFIG = EvaluateConfig(
    batch_size=16, gsm_max_new_tokens=8, humaneval_max_new_tokens=8, heldout_context_tokens=32, device="cpu"
)


def choice_rows(name: str, count: int, choices: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{name}-{i}",
            "question": f"Question {i} of {name}?",
            "choices": choices,
            "answer": i % len(choices),
        }
        for i in range(count)
    ]


def answer_rows(name: str, count: int, **fields: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}-{i}", "question": f"Question {i} of {name}?", "answer": str(i), **fields}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Parents of the stage, all tiny."""
    root = tmp_path_factory.mktemp("parents")
    write_shards(root / "tokenize", TEXTS, tiny_tokenizer())
    for seed, (_, parent, folder) in enumerate(MODELS):
        save_tiny(root / parent / folder, seed)
    about = ("src", "MIT", "")
    code = answer_rows(
        "humaneval", 4, test="def check(candidate):\n    assert candidate(1) == 1", entry_point="f"
    )
    for row in code:
        row["question"] = "def f(x):\n"
    write_sets(
        root / "evalsets",
        {
            "mmlu": EvalSet(
                "multiple_choice", 0.25, *about, choice_rows("m", 6, ["a", "bb", "ccc", "d"]), []
            ),
            "parables_zh": EvalSet(
                "multiple_choice", 0.2, *about, choice_rows("z", 5, list("甲乙丙丁戊")), []
            ),
            "topic": EvalSet(
                "multiple_choice", 1 / 3, *about, choice_rows("t", 6, ["Arts", "History", "People"]), []
            ),
            "arithmetic": EvalSet("generated", 0.0, *about, answer_rows("a", 6), []),
            "gsm": EvalSet("generated", 0.0, *about, answer_rows("g", 5), []),
            "humaneval": EvalSet("code", 0.0, *about, code, []),
        },
        0.4,
    )
    return {name: root / name for name in ("pretrain", "posttrain", "merge", "tokenize", "evalsets")}


def context_of(out: Path, inputs: dict[str, Path], config: EvaluateConfig = CONFIG) -> StageContext:
    out.mkdir(exist_ok=True)
    return StageContext("evaluate", "test", config.model_dump(mode="json"), inputs, out, out)


@pytest.fixture(scope="module")
def evaluated(
    inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("evaluated")
    return out, run(context_of(out, inputs))


def test_results_follow_the_contract(evaluated: tuple[Path, dict[str, float]]) -> None:
    out, headline = evaluated
    results = json.loads((out / "results.json").read_text())
    assert list(results) == sorted(["base", "posttrain", "merged"])
    wanted = {
        "mmlu",
        "mmlu_cloze",
        "parables_zh",
        "topic",
        "topic_plain",
        "topic_generated",
        "arithmetic",
        "gsm",
    }
    wanted |= {"heldout_general", "heldout_chinese", "heldout_overall"}
    if probe() is None:
        wanted.add("humaneval")
    for name, cells in results.items():
        assert set(cells) == wanted
        for cell in cells.values():
            assert {"metric", "value", "ci_low", "ci_high", "n", "chance"} <= set(cell)
            assert cell["ci_low"] <= cell["value"] <= cell["ci_high"]
            if cell["metric"] != "bits_per_byte":
                assert 0 <= cell["value"] <= 1 and 0 <= cell["chance"] < 1
        assert headline[f"{name}_topic_accuracy"] == cells["topic"]["value"]
        assert cells["topic"]["n"] == 4  # the test split of six, never the dev split
    assert all(isinstance(value, float) and math.isfinite(value) for value in headline.values())
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / "samples" / "merged.jsonl").read_text().splitlines()]
    assert {sample["task"] for sample in samples} >= {"topic", "gsm"}
    assert all(sample["prompt"] and sample["id"] for sample in samples)


def test_statistics_follow_the_contract(evaluated: tuple[Path, dict[str, float]]) -> None:
    stats = json.loads((evaluated[0] / "activation_stats.json").read_text())
    assert stats["tokens"] == sum(len(text.encode()) + 1 for texts in TEXTS.values() for text in texts)
    assert list(stats["by_category"]) == sorted(["general", "chinese"])
    for frequencies in (stats["expert_frequency"], *stats["by_category"].values()):
        assert len(frequencies) == 4
        assert all(sum(layer) == pytest.approx(2.0) for layer in frequencies)  # K = 2
    assert all(0 <= share <= 1 for layer in stats["neuron_sparsity"] for share in layer)
    assert all(0 <= share <= 1 for share in stats["temporal_locality"])


def test_hf_backend_agrees(
    inputs: dict[str, Path], tmp_path: Path, evaluated: tuple[Path, dict[str, float]]
) -> None:
    tasks = ("mmlu", "topic", "topic_generated")
    run(context_of(tmp_path, inputs, CONFIG.model_copy(update={"backend": "hf", "tasks": tasks})))
    ours = json.loads((evaluated[0] / "results.json").read_text())
    theirs = json.loads((tmp_path / "results.json").read_text())
    for name in ours:
        for task in tasks:
            assert ours[name][task] == theirs[name][task]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=i, metadata=("t", i, 1))
        for i, argument in enumerate(arguments)
    ]


def test_log_likelihoods_equal_those_of_hflm() -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_model(1), tiny_tokenizer()
    ours = SharedPrefixLM(model, tokenizer, batch_size=8)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    pairs = [
        ("Question: why?\nAnswer:", " because"),
        ("Question: why?\nAnswer:", " B"),
        ("Question: why? ", "trailing space"),
        ("", "no context at all"),
        ("长" * 300, "答案"),  # 900 bytes: more than the 512 tokens that the model may see
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "Arts"),
    ]
    for a, b in zip(
        ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True),
        theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True),
        strict=True,
    ):
        assert a[0] == pytest.approx(b[0], abs=1e-3)
        assert a[1] == b[1]
    texts = [("short",), ("a text that is longer than one window. " * 30,)]
    assert ours.loglikelihood_rolling(
        requests("loglikelihood_rolling", texts), disable_tqdm=True
    ) == pytest.approx(
        theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True), rel=1e-4
    )
    settings = {"until": ["zz", "\n"], "do_sample": False, "max_gen_toks": 12}
    prompts = [(prompt, settings) for prompt in ("one", "a longer prompt", "春")]
    assert ours.generate_until(
        requests("generate_until", prompts), disable_tqdm=True
    ) == theirs.generate_until(requests("generate_until", prompts), disable_tqdm=True)


def test_sampling_is_refused_clearly() -> None:
    lm = SharedPrefixLM(tiny_model(), tiny_tokenizer())
    settings = {"until": [], "do_sample": True, "temperature": 0.7, "max_gen_toks": 4}
    with pytest.raises(StageError, match=r"evaluate\.backend = 'hf'"):
        lm.generate_until(requests("generate_until", [("p", settings)]), disable_tqdm=True)


def test_bits_per_byte_against_plain_arithmetic(inputs: dict[str, Path]) -> None:
    model = tiny_model(2)
    config = CONFIG.model_copy(update={"heldout_context_tokens": 512})
    cells, _ = measure(model, HeldOutText.open(inputs["tokenize"], config), config)
    tokenizer = tiny_tokenizer()
    for category, documents in TEXTS.items():
        nats, size = 0.0, 0
        for text in documents:
            ids = [256, *tokenizer.encode(text), 256]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
            nats -= float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
            size += len(text.encode())
        assert tokenizer.eos_token_id == 256
        assert cells[f"{category}"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_routing_counts_each_token_once(inputs: dict[str, Path]) -> None:
    """Overlapping windows must not count a token twice, and no expert may be counted for unscored context."""
    model = tiny_model(2)
    text = HeldOutText.open(inputs["tokenize"], CONFIG)
    _, narrow = measure(model, text, CONFIG.model_copy(update={"heldout_context_tokens": 32}))
    assert sum(narrow.tokens.values()) == sum(map(len, text.streams.values()))
    assert sum(counts.sum() for counts in narrow.chosen.values()) == 4 * 2 * sum(narrow.tokens.values())


def test_a_killed_run_keeps_finished_models(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"tasks": ("topic",)})
    context = context_of(tmp_path, inputs, config)
    write_json(context.scratch / "base.json", {"cells": {"topic": {"value": 0.5}}, "extra": {}})
    (context.scratch / "posttrain.json").write_text('{"cells": {')  # torn
    headline = run(context)
    assert headline["base_topic_accuracy"] == 0.5
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["posttrain"]["topic"]["n"] == 4


@pytest.mark.skipif(probe() is not None, reason=str(probe()))
def test_programs_are_judged() -> None:
    doc = {
        "question": "def add(a, b):\n    '''Sum.'''\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "entry_point": "add",
    }

    def judged(*completions: str, timeout_s: float) -> list[bool]:
        samples = [{"doc": doc, "filtered_resps": [text]} for text in completions]
        return harness.judge_programs(samples, timeout_s, progress=False)

    ending = ("    return a + b\n", "    return a - b\n", "    return (")
    assert judged(*ending, timeout_s=CEILING_S) == [True, False, False]
    # time is the subject: the program has no end, so that any limit is exceeded
    assert judged("    while True: pass\n", timeout_s=1.0) == [False]


def test_missing_and_malformed_parents_are_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    def failing(message: str, **changed: Path) -> None:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        with pytest.raises(StageError, match=message):
            run(context_of(out, inputs | changed, CONFIG.model_copy(update={"tasks": ("topic",)})))

    empty = tmp_path / "empty"
    empty.mkdir()
    failing("run the stage evalsets", evalsets=empty)
    failing("holds no model", pretrain=empty)
    failing("index.json is missing", tokenize=empty)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "index.json").write_text(json.dumps({"topic": {"kind": "multiple_choice", "chance": 0.1}}))
    (broken / "topic.jsonl").write_text('{"id": "a", "question": "q", "answer": "x", "split": "test"}\n')
    failing("not multiple choice", evalsets=broken)
    (broken / "topic.jsonl").write_text('{"id": "a", "question": "q", "answer": "x", "split": "dev"}\n')
    failing("no questions in its test split", evalsets=broken)
    (broken / "index.json").write_text('{"mmlu": {"kind": "multiple_choice"}}')
    failing("needs the set topic", evalsets=broken)
    (broken / "index.json").write_text("[")
    failing("not an index", evalsets=broken)


@pytest.mark.campaign  # lm-eval first reads its 14,000 task files
def test_an_unknown_stock_task_is_named() -> None:
    lm = SharedPrefixLM(tiny_model(), tiny_tokenizer())
    with pytest.raises(StageError, match="no_such_task_anywhere"):
        harness.stock_cells(lm, EvaluateConfig(stock_tasks=("no_such_task_anywhere",)), chat=False)


def test_task_files_are_plain_lm_eval(inputs: dict[str, Path], tmp_path: Path) -> None:
    forms = write_tasks(tmp_path, inputs["evalsets"], ("mmlu", "gsm"), CONFIG)
    assert [forms[name].chat for name in ("mmlu", "gsm")] == [False, True]
    settings = json.loads((tmp_path / "mmlu.yaml").read_text())
    assert settings["dataset_path"] == "json" and settings["task"] == "nano_mmlu"
    with pytest.raises(StageError, match="no local task is called"):
        write_tasks(tmp_path, inputs["evalsets"], ("nonsense",), CONFIG)  # type: ignore[arg-type]


def test_a_wrong_configuration_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    context = StageContext("evaluate", "test", {"backend": "vllm"}, inputs, tmp_path, tmp_path)
    with pytest.raises(StageError, match="backend"):
        run(context)
