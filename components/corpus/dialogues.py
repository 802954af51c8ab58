"""Dialogues as token ids with a loss mask: ``DialogueEncoder.open(tokenizer_folder).encode(messages)``.

The tokenizer's own chat template decides the markup. It is rendered once per sequence of roles with placeholders in
the contents' places; control tokens therefore come from the template alone, and text in a message that merely looks
like one (``<|im_end|>``) is encoded as ordinary text. Only what the assistant generates carries loss: its content and
the token that closes its turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from components.artifacts import StageError
from components.corpus.special_tokens import END_OF_TEXT, TURN_END

ROLES = ("system", "user", "assistant")
# Private-use characters frame a message's number in the rendered template; contents are never rendered.
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")

Message = dict[str, str]


@dataclass(frozen=True)
class Dialogue:
    """One row of ``sft.jsonl``."""

    messages: tuple[Message, ...]
    task: str
    source: str


@dataclass(frozen=True)
class Encoded:
    """A dialogue's token ids [T], and for each whether the assistant produced it (and so carries loss)."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def cut(self, length: int) -> Encoded:
        """The first ``length`` tokens; a cut turn keeps the loss on what is left and gets no closing token."""
        return Encoded(self.ids[:length], self.trained[:length])


@dataclass(frozen=True)
class _Piece:
    """A run of the rendered template: a control token, fixed text, or the place of message ``index``."""

    token: int | None = None
    text: str = ""
    index: int | None = None


def read_dialogues(path: Path) -> list[Dialogue]:
    """The rows of ``sft.jsonl``, in order.

    Raises:
        StageError: the file is missing or empty, or a row is malformed; the message names the line.
    """
    try:
        with path.open(encoding="utf-8") as handle:
            rows = [_parse_row(line, path, number) for number, line in enumerate(handle, 1) if line.strip()]
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing; the stage synthesize writes it.") from error
    except UnicodeDecodeError as error:
        raise StageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if not rows:
        raise StageError(f"{path} holds no dialogue; SFT needs at least one.")
    return rows


def _parse_row(line: str, path: Path, number: int) -> Dialogue:
    try:
        row = json.loads(line)
        messages = tuple({"role": str(m["role"]), "content": m["content"]} for m in row["messages"])
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}, line {number}, is not an SFT row ({error!r}).") from error
    where = f"{path}, line {number}"
    if not messages:
        raise StageError(f"{where}: the dialogue has no messages.")
    for message in messages:
        if message["role"] not in ROLES:
            raise StageError(f"{where}: role {message['role']!r} is not one of {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise StageError(
                f"{where}: a message's content must be text, not {type(message['content']).__name__}."
            )
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise StageError(f"{where}: no assistant message with content, so there is nothing to learn.")
    return Dialogue(messages, str(row.get("task", "")), str(row.get("source", "")))


class DialogueEncoder:
    """Encodes dialogues with a tokenizer and its chat template.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.

    Raises:
        StageError: no chat template, or no ``<|im_end|>`` / ``<|endoftext|>``.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise StageError("the tokenizer has no chat template; the stage tokenize writes one.")
        self.tokenizer = tokenizer
        self._plain = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True  # "<|im_end|>" in a message is text
        self._plain.no_truncation()
        self._plain.no_padding()
        self._special = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        for name in (TURN_END, END_OF_TEXT):
            if name not in self._special:
                raise StageError(f"the tokenizer has no special token {name}; ChatML needs it.")
        self.end_of_turn_id = self._special[TURN_END]
        self.end_of_text_id = self._special[END_OF_TEXT]
        names = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._pieces = lru_cache(maxsize=256)(self._render)

    @classmethod
    def open(cls, folder: Path) -> DialogueEncoder:
        """Read a tokenizer folder.

        Raises:
            StageError: it cannot be read.
        """
        try:
            return cls(AutoTokenizer.from_pretrained(folder))
        except (OSError, ValueError) as error:
            raise StageError(f"{folder} does not hold a readable tokenizer ({error}).") from error

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a generation: ``[<|endoftext|>, <|im_end|>]``."""
        return [self.end_of_text_id, self.end_of_turn_id]

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Token ids of a whole dialogue and its loss mask.

        Raises:
            StageError: the template drops or repeats a message.
        """
        return self._encode(messages, add_generation_prompt=False)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant begins to generate."""
        return list(self._encode(messages, add_generation_prompt=True).ids)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an assistant's content, as in :meth:`encode`, with the closing token."""
        return [*self._text_ids(text), self.end_of_turn_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without control tokens."""
        text: str = self._plain.decode(list(ids), skip_special_tokens=True)
        return text

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> Encoded:
        roles = tuple(message["role"] for message in messages)
        ids: list[int] = []
        trained: list[bool] = []
        pending = ""  # fixed text and prompts' contents that the tokenizer sees as one run

        def flush() -> None:
            nonlocal pending
            found = self._text_ids(pending)
            ids.extend(found)
            trained.extend([False] * len(found))
            pending = ""

        closing = False  # the next control token closes an assistant's turn
        for piece in self._pieces(roles, add_generation_prompt):
            if piece.token is not None:
                flush()
                ids.append(piece.token)
                trained.append(closing and piece.token == self.end_of_turn_id)
                closing = False
            elif piece.index is None:
                pending += piece.text
            elif roles[piece.index] == "assistant":
                flush()  # generation starts here, so no token may span the boundary
                found = self._text_ids(messages[piece.index]["content"])
                ids.extend(found)
                trained.extend([True] * len(found))
                closing = True
            else:
                pending += messages[piece.index]["content"]
        flush()
        return Encoded(tuple(ids), tuple(trained))

    def _render(self, roles: tuple[str, ...], add_generation_prompt: bool) -> tuple[_Piece, ...]:
        marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        text = self.tokenizer.apply_chat_template(
            marked, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        pieces = tuple(self._split(text))
        found = [piece.index for piece in pieces if piece.index is not None]
        if found != list(range(len(roles))):
            raise StageError(
                f"the chat template does not write each message of a {' / '.join(roles)} dialogue once and in order."
            )
        return pieces

    def _split(self, text: str) -> Iterator[_Piece]:
        for number, part in enumerate(_PLACEHOLDER.split(text)):
            if number % 2:
                yield _Piece(index=int(part))
                continue
            for run in self._special_pattern.split(part):
                if run in self._special:
                    yield _Piece(token=self._special[run])
                elif run:
                    yield _Piece(text=run)
