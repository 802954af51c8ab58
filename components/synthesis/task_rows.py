"""SFT rows whose answers are known without a teacher: ``task_rows(config, curated, evaluation)``.

The formats and the rule that keeps training and evaluation apart are shared with evaluation (``corpus/templates.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.artifacts import StageError
from components.corpus import templates
from components.corpus.templates import EVAL_SEED_START, TOPICS, is_reserved
from components.synthesis.config import TaskConfig
from components.synthesis.selection import choose, read_documents

Row = dict[str, Any]
_GSM = "gsm_symbolic"


def task_rows(
    config: TaskConfig, curated: Path, seed: int, count: Callable[[str, str | None], None]
) -> Iterator[Row]:
    """Topic, arithmetic and generated rows, in this order, each distinct.

    Args:
        curated: the ``curate`` artefact.
        count: told for every candidate its task and the reason it was left out, ``None`` when it was kept.

    Raises:
        StageError: a reasoning_gym generator is unknown or a seed would reach evaluation's.
    """
    seen: set[str] = set()
    for task, key, row in _candidates(config, curated, seed):
        question = row["messages"][0]["content"]
        reason = "reserved" if is_reserved(key) else "duplicate" if question in seen else None
        seen.add(question)
        count(task, reason)
        if reason is None:
            yield row


def _candidates(config: TaskConfig, curated: Path, seed: int) -> Iterator[tuple[str, str, Row]]:
    yield from _topics(config, curated, seed)
    yield from _arithmetic(config)
    for number, (generator, size) in enumerate(config.generated_rows.items()):
        yield from _generated(
            generator, size, _checked(config.first_seed + (number + 2) * 1_000_000 // 20, size)
        )


def _topics(config: TaskConfig, curated: Path, seed: int) -> Iterator[tuple[str, str, Row]]:
    path = curated / "train" / "general.jsonl"
    if not config.topic_rows or not path.is_file():
        return
    labelled = (d for d in read_documents(path) if d["metadata"].get("topic") in TOPICS)
    for document in choose(labelled, config.topic_rows, 40, (seed, "topic")):
        messages = templates.topic_messages(document["text"], document["metadata"]["topic"])
        yield "topic", title_of(document["id"]), _row(messages, "topic", document["metadata"].get("source"))


def title_of(document_id: str) -> str:
    """The article's title, which decides what is reserved, from the id that ``curate`` made of it."""
    return document_id.split("/", 1)[-1].replace("_", " ")


def _arithmetic(config: TaskConfig) -> Iterator[tuple[str, str, Row]]:
    size = config.arithmetic_rows
    if not size:
        return
    for expression, answer in templates.arithmetic_problems(_checked(config.first_seed, size), size):
        yield (
            "arithmetic",
            expression,
            _row(templates.arithmetic_messages(expression, answer), "arithmetic", "reasoning_gym"),
        )


def _generated(generator: str, size: int, seed: int) -> Iterator[tuple[str, str, Row]]:
    if not size:
        return
    try:
        problems = templates.generated_items(generator, seed, size)
    except ValueError as error:
        raise StageError(
            f"tasks.generated_rows names {generator!r}, which reasoning_gym does not have"
        ) from error
    for problem in problems:
        question, answer = str(problem["question"]).strip(), str(problem["answer"])
        if generator == _GSM:
            messages = templates.gsm_messages(question, problem["metadata"]["answer_cot"])
        else:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield generator, question, _row(messages, generator, "reasoning_gym")


def _checked(seed: int, size: int) -> int:
    if seed + size >= EVAL_SEED_START:
        raise StageError(
            f"training seeds {seed} to {seed + size} would reach evaluation's, which start at {EVAL_SEED_START}; "
            "lower tasks.first_seed or the number of rows"
        )
    return seed


def _row(messages: list[dict[str, str]], task: str, source: object) -> Row:
    return {"messages": messages, "task": task, "source": str(source or "unknown")}
