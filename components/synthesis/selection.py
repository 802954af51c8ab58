"""Which documents, pairs, personas and problems are used: ``select_items(config, curated, roles)``.

Choices depend on the seed and on the documents' ids alone. Kinds are interleaved in proportion, so that a time limit
shortens all of them alike.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from components.artifacts import StageError
from components.corpus.templates import GSM_INSTRUCTION, generated_items, is_reserved
from components.synthesis.config import SynthesizeConfig
from components.synthesis.items import Document, DocumentPersona, Item, Problem, Question, Rewrite
from components.synthesis.prompts import pairs
from components.synthesis.texts import excerpt

_PROBLEM_SEED_OFFSET = 500_000


def number_of(*parts: object) -> int:
    """A 64-bit number that depends on the parts alone, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one category.

    Raises:
        StageError: a line is not a document; the message names the file and the line.
    """
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                document = json.loads(line)
                if not isinstance(document["text"], str) or not isinstance(document["metadata"], dict):
                    raise TypeError("text or metadata")
                document["id"] = str(document["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise StageError(
                    f"{path} line {number} is not a document ({error!r}); rebuild curate"
                ) from error
            yield document


def choose(documents: Iterable[Document], count: int, minimum_chars: int, seed: object) -> list[Document]:
    """``count`` documents of at least ``minimum_chars``, by hash: the same whatever the order they come in."""
    if count == 0:
        return []
    eligible = (document for document in documents if len(document["text"].strip()) >= minimum_chars)
    return heapq.nsmallest(
        count, eligible, key=lambda document: (number_of(seed, document["id"]), document["id"])
    )


def select_items(config: SynthesizeConfig, curated: Path, roles: Sequence[str]) -> list[Item]:
    """Everything to ask, in order.

    Args:
        curated: the ``curate`` artefact.
        roles: personas of the registry's collection; without any, their items are left out.

    Raises:
        StageError: a category that the config names has no documents.
    """
    groups: list[list[Item]] = [_rewrites(config, curated, category) for category in config.mga.documents]
    groups.append(_document_personas(config, curated))
    if roles:
        groups.append(_problems(config, roles))
        groups.append(
            [
                Question(number, roles[number_of(config.seed, "question", number) % len(roles)])
                for number in range(config.personas.questions)
            ]
        )
    return interleave(groups)


def interleave(groups: Sequence[Sequence[Any]]) -> list[Any]:
    """Merge sequences so that every beginning of the result holds all of them in proportion."""
    placed = [
        ((position + 0.5) / len(group), which, item)
        for which, group in enumerate(groups)
        for position, item in enumerate(group)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def _category(curated: Path, category: str) -> Path:
    path = curated / "train" / f"{category}.jsonl"
    if not path.is_file():
        raise StageError(
            f"the curated data has no {path.name}; set mga.documents.{category} to 0 or curate that category"
        )
    return path


def _rewrites(config: SynthesizeConfig, curated: Path, category: str) -> list[Item]:
    mga = config.mga
    count = mga.documents[category]  # type: ignore[index]
    if count == 0:
        return []
    documents = read_documents(_category(curated, category))
    pool = pairs()
    return [
        Rewrite(
            document,
            excerpt(document["text"], mga.source_chars),
            pool[number_of(config.seed, "pair", document["id"]) % len(pool)],
        )
        for document in choose(documents, count, mga.min_source_chars, (config.seed, "mga", category))
    ]


def _document_personas(config: SynthesizeConfig, curated: Path) -> list[Item]:
    count = config.personas.from_documents
    if count == 0:
        return []
    documents = read_documents(_category(curated, "general"))
    chosen = choose(documents, count, config.mga.min_source_chars, (config.seed, "persona"))
    return [
        DocumentPersona(document, excerpt(document["text"], config.mga.source_chars)) for document in chosen
    ]


def _problems(config: SynthesizeConfig, roles: Sequence[str]) -> list[Item]:
    count = config.personas.problems
    if count == 0:
        return []
    seed = config.tasks.first_seed + _PROBLEM_SEED_OFFSET
    problems = generated_items("gsm_symbolic", seed, 2 * count)
    items: list[Item] = []
    for number, problem in enumerate(problems):
        if len(items) < count and not is_reserved(problem["question"]):
            items.append(
                Problem(
                    seed + number,
                    problem["question"].removesuffix(GSM_INSTRUCTION),
                    problem["metadata"]["answer_cot"],
                    problem["answer"],
                    roles[number_of(config.seed, "problem", number) % len(roles)],
                )
            )
    return items
