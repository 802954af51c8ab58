"""Config, prompts, selection of items, ledger and personas."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from components.artifacts import StageError
from components.corpus.templates import EVAL_SEED_START, is_reserved, topic_messages
from components.synthesis import SynthesizeConfig
from components.synthesis.config import TaskConfig
from components.synthesis.personas import read_collection
from components.synthesis.prompts import JUDGE_SCHEMA, judge, pairs, read_score, rewrite
from components.synthesis.selection import choose, interleave, select_items
from components.synthesis.task_rows import task_rows, title_of
from components.synthesis.teacher.ledger import Answer, Ledger, digest_of


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"teacher": {"kind": "endpoint"}}, "base_url and model"),
        ({"teacher": {"kind": "engine"}}, "engine_model"),
        ({"teacher": {"kind": "oracle"}}, "vllm"),
        ({"teacher": {"base_url": "localhost:8000"}}, "base_url"),
        ({"mga": {"documents": {"poetry": 3}}}, "poetry"),
        ({"mga": {"documents": {"general": -1}}}, "documents.general"),
        ({"mga": {"source_chars": 200, "min_source_chars": 300}}, "must not exceed"),
        ({"filters": {"max_copied": 1.5}}, "max_copied"),
        ({"tasks": {"first_seed": EVAL_SEED_START}}, "first_seed"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SynthesizeConfig.model_validate(values)


def test_config_survives_json() -> None:
    config = SynthesizeConfig()
    assert SynthesizeConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_pairs_and_prompts() -> None:
    pool = pairs()
    assert len(pool) == len({(pair.genre, pair.audience) for pair in pool}) == 144
    for pair in pool:
        assert pair.genre_text.count(".") >= 2 and pair.audience_text.count(".") >= 2
        full, brief = rewrite("SOURCE", pair), rewrite("SOURCE", pair, brief=True)
        assert full[1]["content"].endswith("SOURCE") and brief[1]["content"].endswith("SOURCE")
        assert pair.genre_text in full[1]["content"] and pair.audience_text in full[1]["content"]
        assert pair.titles[0] in brief[1]["content"] and "." not in pair.titles[0]
    assert "TEXT" in judge("TEXT", "OTHER")[1]["content"] and "OTHER" in judge("TEXT", "OTHER")[1]["content"]
    assert JUDGE_SCHEMA["type"] == "json_schema"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"score": 4}', 4),
        ('Well: {"score": 1} I think', 1),
        ('{"score": 6}', None),
        ('{"score": true}', None),
        ('{"score": "4"}', None),
        ("4", None),
        ("} {", None),
        ("[1]", None),
    ],
)
def test_read_score(answer: str, score: int | None) -> None:
    assert read_score(answer) == score


@given(st.lists(st.integers(0, 12), max_size=5))
def test_interleaving_keeps_order_and_proportion(sizes: list[int]) -> None:
    merged = interleave([[(which, i) for i in range(size)] for which, size in enumerate(sizes)])
    for which, size in enumerate(sizes):
        mine = [position for position, item in enumerate(merged) if item[0] == which]
        assert [merged[position][1] for position in mine] == list(range(size))
        for rank, position in enumerate(mine):  # never further from its share than one item of every group
            assert abs((position + 1) / len(merged) - (rank + 1) / size) <= (len(sizes) + 1) / size + 1 / len(
                merged
            )


def test_choice_ignores_order_and_length_rule_holds() -> None:
    documents = [{"id": str(n), "text": "x" * n, "metadata": {}} for n in range(100)]
    shuffled = random.Random(1).sample(documents, 100)
    chosen = choose(documents, 10, 50, 7)
    assert chosen == choose(shuffled, 10, 50, 7) and len(chosen) == 10
    assert all(len(document["text"]) >= 50 for document in chosen)
    assert chosen != choose(documents, 10, 50, 8)
    assert len(choose(documents, 1000, 50, 7)) == 50


def test_selection_is_stable_and_ids_are_unique(inputs: dict[str, Path]) -> None:
    config = SynthesizeConfig.model_validate({"mga": {"documents": {"general": 40}}})
    items = select_items(config, inputs["curate"], ["a gardener", "a pilot"])
    assert items == select_items(config, inputs["curate"], ["a gardener", "a pilot"])
    assert len({item.id for item in items}) == len(items) == 40 + 24 + 40 + 40
    assert {item.kind for item in select_items(config, inputs["curate"], [])} == {"mga", "document_persona"}


def test_missing_category_is_named(inputs: dict[str, Path]) -> None:
    config = SynthesizeConfig.model_validate({"mga": {"documents": {"chinese": 4}}})
    with pytest.raises(StageError, match=r"chinese\.jsonl"):
        select_items(config, inputs["curate"], [])


def test_task_rows_keep_to_training(inputs: dict[str, Path]) -> None:
    config = TaskConfig(topic_rows=100, arithmetic_rows=300, generated_rows={"gsm_symbolic": 40, "gcd": 10})
    counted: dict[tuple[str, str | None], int] = {}

    def count(task: str, reason: str | None) -> None:
        counted[task, reason] = counted.get((task, reason), 0) + 1

    rows = list(task_rows(config, inputs["curate"], 1, count))
    assert len(rows) == sum(number for (_, reason), number in counted.items() if reason is None)
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(questions)
    by_task = {task: [row for row in rows if row["task"] == task] for task in {row["task"] for row in rows}}
    assert counted["arithmetic", "reserved"] > 0
    for row in by_task["arithmetic"]:
        expression = row["messages"][0]["content"].removeprefix("What is ").removesuffix("?")
        assert not is_reserved(expression)
        left, sign, right = expression.split()
        assert int(row["messages"][1]["content"]) == (
            int(left) + int(right) if sign == "+" else int(left) - int(right)
        )
    documents = {
        document["id"]: document
        for document in map(json.loads, (inputs["curate"] / "train/general.jsonl").read_text().splitlines())
    }
    allowed = [
        topic_messages(document["text"], document["metadata"]["topic"])
        for key, document in documents.items()
        if document["metadata"]["topic"] != "Uncategorized" and not is_reserved(title_of(key))
    ]
    assert len(by_task["topic"]) == len(allowed) and all(
        row["messages"] in allowed for row in by_task["topic"]
    )
    assert all("####" in row["messages"][1]["content"] for row in by_task["gsm_symbolic"])


def test_titles_with_slashes() -> None:
    assert title_of("summaries/AC/DC_(band)") == "AC/DC (band)"


def test_task_errors(inputs: dict[str, Path]) -> None:
    def rows(**values: Any) -> None:
        list(task_rows(TaskConfig(topic_rows=0, **values), inputs["curate"], 1, lambda task, reason: None))

    with pytest.raises(StageError, match="no_such_generator"):
        rows(arithmetic_rows=0, generated_rows={"no_such_generator": 3})
    with pytest.raises(StageError, match="would reach evaluation"):
        rows(arithmetic_rows=2_000_000, first_seed=8_500_000)


def test_ledger_remembers_exact_requests(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    request, other = digest_of({"a": 1}), digest_of({"a": 2})
    with Ledger(path) as ledger:
        ledger.put("item#1", request, Answer("yes", "stop", 3, 4))
        ledger.put("item#2", request, Answer("HTTP 500", "failed"))
        ledger.add_fact("asking_s", 1.5)
    with Ledger(path) as ledger:
        ledger.add_fact("asking_s", 1.0)
        assert ledger.get("item#1", request) == Answer("yes", "stop", 3, 4)
        assert ledger.get("item#1", other) is None and ledger.get("item#3", request) is None
        assert ledger.totals() == {"requests": 2, "failed": 1, "prompt_tokens": 3, "completion_tokens": 4}
        assert (
            ledger.fact("asking_s") == 2.5
            and ledger.fact("other") == 0
            and ledger.last_failure() == "HTTP 500"
        )


def test_collection_keeps_people_only(tmp_path: Path) -> None:
    prompts = [
        "I want you to act as an Accountant and find ways",
        "Act as a Linux terminal. I will type",
        "Act as a career counselor, who listens",
        "act as a prompt generator",
        "Draw a cat",
        "I want you to act as a career counselor.",
        "Act as an AI writing tutor",
    ]
    path = tmp_path / "personas.json"
    path.write_text(json.dumps({str(i): {"prompt": prompt} for i, prompt in enumerate(prompts)}))
    assert read_collection(path) == ["an accountant", "a career counselor"]
