"""The texts to tokenize, curated, synthetic and chat, by split and category: ``TextSources(curate, synthesize)``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from components.artifacts import StageError
from components.corpus.categories import CATEGORIES
from components.corpus.hashing import hash_fraction
from components.tokenization.vocabulary import CHATML_TEMPLATE

SPLITS = ("train", "heldout")
SFT_HELDOUT_FRACTION = 0.025
_LEAST_SFT_ROWS = 20


@dataclass(frozen=True)
class Text:
    """A document's id and text; ``chat`` marks ChatML, whose special tokens are meant as such."""

    id: str
    text: str
    chat: bool = False


class TextSources:
    """The documents of the ``curate`` and ``synthesize`` artefacts.

    Args:
        curate: folder with ``train/<category>.jsonl`` and ``heldout/<category>.jsonl``.
        synthesize: folder with ``documents.jsonl`` and ``sft.jsonl``, each of which may be empty or absent.
        special: special tokens; chat rows that quote one are left out, since ChatML could not tell it apart.
    """

    def __init__(self, curate: Path, synthesize: Path, special: tuple[str, ...]):
        self.curate = curate
        self.documents_path = synthesize / "documents.jsonl"
        self.sft_path = synthesize / "sft.jsonl"
        self.special = special
        self.quoting_rows = 0

    def texts(self, split: str, category: str) -> Iterator[Text]:
        """The texts of one split and category, in a stable order; empty when there are none.

        Raises:
            StageError: a file is not JSON lines of the contract's form; the message names file and line.
        """
        if category == "sft":
            yield from self._chats(split)
            return
        path = self.curate / split / f"{category}.jsonl"
        for number, row in _rows(path):
            yield Text(str(row.get("id", f"{category}/{number}")), _text_of(row, path, number))
        if split == "train":
            for number, row in _rows(self.documents_path):
                if _category_of(row, self.documents_path, number) == category:
                    identifier = str(row.get("id", f"synthetic/{number}"))
                    yield Text(identifier, _text_of(row, self.documents_path, number))

    def _chats(self, split: str) -> Iterator[Text]:
        self.quoting_rows = 0
        limit = SFT_HELDOUT_FRACTION if self._sft_rows >= _LEAST_SFT_ROWS else 0.0
        for number, row in _rows(self.sft_path):
            messages = _messages_of(row, self.sft_path, number)
            if any(token in message["content"] for message in messages for token in self.special):
                self.quoting_rows += 1
                continue
            text = self._template.render(messages=messages, add_generation_prompt=False)
            identifier = f"sft/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
            if ("heldout" if hash_fraction(identifier) < limit else "train") == split:
                yield Text(identifier, text, chat=True)

    @cached_property
    def _sft_rows(self) -> int:
        return sum(1 for _ in _rows(self.sft_path))

    @cached_property
    def _template(self) -> jinja2.Template:
        return jinja2.Environment(keep_trailing_newline=True).from_string(CHATML_TEMPLATE)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        return
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise StageError(
                    f"{path} line {number} is not JSON; the artefact is damaged, rebuild it"
                ) from error
            if not isinstance(row, dict):
                raise StageError(
                    f"{path} line {number} is not a JSON object; the artefact is damaged, rebuild it"
                )
            yield number, row


def _text_of(row: dict[str, Any], path: Path, number: int) -> str:
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise StageError(f"{path} line {number} has no text")
    return text


def _category_of(row: dict[str, Any], path: Path, number: int) -> str:
    metadata = row.get("metadata")
    category = metadata.get("category") if isinstance(metadata, dict) else None
    if category not in CATEGORIES:
        allowed = ", ".join(CATEGORIES)
        raise StageError(f"{path} line {number} has the category {category!r}, allowed are {allowed}")
    return str(category)


def _messages_of(row: dict[str, Any], path: Path, number: int) -> list[dict[str, str]]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise StageError(f"{path} line {number} has no messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise StageError(f"{path} line {number} has a message without role and content")
    return messages
