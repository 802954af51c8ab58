"""Prompt formats shared by SFT data and evaluation, and the rule that keeps their items apart.

>>> topic_messages("Peach is a fruit tree.", "Biology and health sciences")[-1]
{'role': 'assistant', 'content': 'Biology and health sciences'}

Whoever makes training rows drops every item whose key is reserved: ``is_reserved(title)`` for topics,
``is_reserved(question)`` for arithmetic. Evaluation uses reserved items only, so the two are disjoint by
construction, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any, Final

Message = dict[str, str]

TOPICS: Final[tuple[str, ...]] = (
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
)
"""Topics of the encyclopedia summaries. The source's twelfth label, "Uncategorized", names no topic (its
thousand articles belong to all the others) and is left out of the task."""

UNCATEGORIZED: Final = "Uncategorized"
TOPIC_TEXT_CHARS: Final = 240

EVAL_SEED_START: Final = 10_000_000
"""reasoning_gym derives item i from ``seed + i``: training must keep ``seed + size`` below this number."""

GSM_INSTRUCTION: Final = " Give the result as your final answer. Do not include units."
"""What reasoning_gym's grade-school problems end with."""

RESERVED_PERCENT: Final = 10


def is_reserved(key: str) -> bool:
    """Whether an item belongs to evaluation: SHA-256 of the stripped, case-folded key, one in ten.

    The key is the article's title for topics, the expression (``"12 + 7"``) for arithmetic.
    """
    digest = hashlib.sha256(key.strip().casefold().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < RESERVED_PERCENT


def shorten(text: str, limit: int = TOPIC_TEXT_CHARS) -> str:
    """The first ``limit`` characters of ``text`` on one line, cut after a whole word."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    cut = line[: limit + 1].rsplit(" ", 1)[0]
    return cut[:limit].rstrip(" ,;:")


def topic_question(text: str) -> str:
    """The user's turn of the topic task."""
    return f"Which topic does this text belong to?\n\n{shorten(text)}"


def topic_messages(text: str, topic: str | None = None) -> list[Message]:
    """Chat of the topic task: with ``topic`` an SFT row, without it the question alone.

    Raises:
        ValueError: the topic is not one of ``TOPICS``.
    """
    if topic is not None and topic not in TOPICS:
        raise ValueError(f"topic {topic!r} is not one of {', '.join(TOPICS)}")
    return _chat(topic_question(text), topic)


def arithmetic_question(expression: str) -> str:
    """The user's turn of the arithmetic task for an expression such as ``"12 + 7"``."""
    return f"What is {expression}?"


def arithmetic_messages(question: str, answer: str | None = None) -> list[Message]:
    """Chat of the arithmetic task: ``question`` is the expression (``"12 + 7"``), ``answer`` the number."""
    return _chat(arithmetic_question(question), answer)


def generated_items(name: str, seed: int, size: int, **settings: object) -> Iterable[dict[str, Any]]:
    """Items of a reasoning_gym data set: ``question``, ``answer`` and ``metadata``; item i from ``seed + i``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # in the sources of one of its dependencies
        import reasoning_gym  # type: ignore[import-untyped]  # here: slow to import

    items: Iterable[dict[str, Any]] = reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    return items


def arithmetic_problems(seed: int, size: int) -> list[tuple[str, str]]:
    """``size`` sums and differences of two numbers of one or two digits: ``("15 - 43", "-28")``.

    Made by reasoning_gym's ``chain_sum``; about 16 000 distinct expressions exist, so repeats occur.
    Training keeps those with ``not is_reserved(expression)``.
    """
    problems: list[tuple[str, str]] = []
    for item in generated_items(
        "chain_sum", seed, size, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    ):
        expression = item["question"].rsplit(":", 1)[1].strip().removesuffix("=").strip()
        problems.append((expression, item["answer"]))
    return problems


def gsm_messages(question: str, answer: str | None = None) -> list[Message]:
    """Chat of the grade-school maths task; a full answer is worked out and ends with ``#### N`` (GSM8K)."""
    return _chat(question, answer)


def _chat(question: str, answer: str | None) -> list[Message]:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages
