"""Keeps evaluation items out of synthetic text: ``EvaluationItems.read(folder, …).problem(made)``.

The same 13-gram index as in ``curate``, and every question of the evaluation sets word for word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import StageError
from components.corpus.templates import GSM_INSTRUCTION
from components.synthesis.items import Made

_EXCLUDE_NAME = "exclude.jsonl"


@dataclass
class EvaluationItems:
    """What must not occur.

    Attributes:
        questions: questions, lower-case, spaces levelled.
        filters: curate's overlap filter by language.
    """

    questions: set[str]
    filters: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, ngram: int, min_words: int, scratch: Path) -> EvaluationItems:
        """Index the ``evalsets`` artefact; the index is kept in ``scratch``.

        Raises:
            StageError: a file there is damaged.
        """
        from components.corpus.languages import CHINESE, ENGLISH
        from components.corpus.overlap import OverlapFilter, OverlapIndex

        index = scratch / "overlap.pickle"
        OverlapIndex.build(folder, ngram, min_words).save(index)
        filters = {"en": OverlapFilter(index, ENGLISH, False), "zh": OverlapFilter(index, CHINESE, False)}
        questions = set()
        for path in sorted(folder.glob("*.jsonl")):
            if path.name != _EXCLUDE_NAME:
                questions.update(_questions(path))
        return cls(questions, filters)

    def has_question(self, question: str) -> bool:
        """Whether an evaluation set asks just this."""
        return _level(question) in self.questions

    def problem(self, made: Made) -> str | None:
        """``evaluation_item`` or ``evaluation_overlap`` when what was made must not be kept, else ``None``."""
        from datatrove.data import Document  # type: ignore[import-untyped]

        questions = [made.messages[0]["content"]] if made.messages else []
        if made.generated_question is not None:
            questions += [made.generated_question, made.generated_question + GSM_INSTRUCTION]
        if any(self.has_question(question) for question in questions):
            return "evaluation_item"
        if made.generated_question is not None:
            return None
        language = "zh" if any("\u4e00" <= character <= "\u9fff" for character in made.text) else "en"
        kept = self.filters[language].filter(Document(text=made.text, id=""))
        return None if kept is True else "evaluation_overlap"


def _questions(path: Path) -> set[str]:
    found = set()
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                found.add(_level(str(json.loads(line)["question"])))
            except (ValueError, KeyError, TypeError) as error:
                raise StageError(
                    f"{path} line {number} is not an evaluation item; rebuild evalsets"
                ) from error
    return found


def _level(text: str) -> str:
    return " ".join(text.lower().split())
