"""Keeps evaluation items out of the training text: ``OverlapIndex.build(evalsets, …)`` and its filter.

The n-gram test is GPT-3's (13 words shared with a question, appendix C of arXiv:2005.14165) on datatrove's text
normalisation and hashing; ``exclude.jsonl`` of the evaluation sets lists further texts that must not occur.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.data import Document  # type: ignore[import-untyped]
from datatrove.pipeline.filters.base_filter import BaseFilter  # type: ignore[import-untyped]
from datatrove.utils.hashing import HashConfig, create_hash_func  # type: ignore[import-untyped]
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text  # type: ignore[import-untyped]
from datatrove.utils.word_tokenizers import WordTokenizer  # type: ignore[import-untyped]

from components.artifacts import StageError, write_atomically
from components.corpus.languages import CHINESE, SPACES
from components.corpus.templates import is_reserved

EXCLUDE_NAME = "exclude.jsonl"
_EXACT = TextNormConfig(norm_numbers=False)
_LEAST_DISTINCT_WORDS = 5
_hash = create_hash_func(HashConfig())


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


@dataclass
class OverlapIndex:
    """Hashes of what must not occur.

    Attributes:
        grams: hashed word n-grams to the evaluation set's name, by n.
        questions: whole questions, simplified with their numbers kept.
        items: how many evaluation items were read.
        skipped: how many were too short to match on.
    """

    grams: dict[int, dict[int, str]] = field(default_factory=dict)
    questions: set[str] = field(default_factory=set)
    items: int = 0
    skipped: int = 0

    @classmethod
    def build(cls, folder: Path, ngram: int, min_words: int) -> OverlapIndex:
        """Index every ``<task>.jsonl`` and ``exclude.jsonl`` of the ``evalsets`` artefact.

        Raises:
            StageError: a file is not JSON lines with a ``question`` (or ``text``).
        """
        index = cls()
        for path in sorted(folder.glob("*.jsonl")):
            excluded = path.name == EXCLUDE_NAME
            for task, text in _texts(path, "text" if excluded else "question"):
                index.items += 1
                if not excluded:
                    index.questions.add(exact_form(text))
                words = _tokenizer(text).word_tokenize(simplify_text(text))
                if len(words) < min_words:
                    index.skipped += 1
                    continue
                size = min(ngram, len(words))
                table = index.grams.setdefault(size, {})
                grams = (gram for gram in ngrams(words, size) if _is_distinctive(gram))
                table.update((_hash(" ".join(gram)), task) for gram in grams)
        return index

    def save(self, path: Path) -> None:
        """Write the index for the worker processes."""
        write_atomically(path, pickle.dumps(self))


def exact_form(text: str) -> str:
    """Text for whole-question comparison: case, spaces and punctuation normalised, numbers kept."""
    return str(simplify_text(text, _EXACT))


def _tokenizer(text: str) -> WordTokenizer:
    return CHINESE if _is_chinese(text) else SPACES


def _is_distinctive(gram: Sequence[str]) -> bool:
    """Whether an n-gram can identify a text: lists of numbers and repeated signs (``0 0 0 …``) match by chance."""
    return len({word for word in gram if any(map(str.isalpha, word))}) >= _LEAST_DISTINCT_WORDS


def _texts(path: Path, key: str) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                row: Any = json.loads(line)
                value, task = row[key], str(row.get("set", path.stem))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise StageError(f"{path} line {number} is not a JSON object with {key!r}") from error
            if not isinstance(value, str):
                raise StageError(f"{path} line {number}: {key!r} must be text")
            yield task, value


class OverlapFilter(BaseFilter):  # type: ignore[misc]
    """Drops documents that overlap with evaluation items."""

    name = "Decontamination"

    def __init__(self, index: Path, words: WordTokenizer, whole_questions: bool):
        """Args:
        index: file written by :meth:`OverlapIndex.save`.
        words: word tokenizer of the documents.
        whole_questions: compare ``metadata.question`` as a whole instead of n-grams.
        """
        super().__init__()
        self.index_path = str(index)
        self.words = words
        self.whole_questions = whole_questions
        self._index: OverlapIndex | None = None

    @property
    def index(self) -> OverlapIndex:
        """The index; read once per process."""
        if self._index is None:
            loaded = pickle.loads(Path(self.index_path).read_bytes())
            assert isinstance(loaded, OverlapIndex)
            self._index = loaded
        return self._index

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep ``doc``, with the evaluation set's name when not."""
        key = doc.metadata.pop("reserved_key", None)
        if key is not None and is_reserved(key):
            return False, "reserved for evaluation"
        question = doc.metadata.pop("question", None)
        if self.whole_questions:
            found = question is not None and exact_form(question) in self.index.questions
            return (False, "same question") if found else True
        for task in self._matches(doc.text):
            return False, f"shares words with {task}"
        return True

    def _matches(self, text: str) -> Iterable[str]:
        words = self.words.word_tokenize(simplify_text(text))
        for size, table in self.index.grams.items():
            for gram in ngrams(words, size):
                task = table.get(_hash(" ".join(gram)))
                if task is not None:
                    yield task
