"""Tokens to text pieces: whole characters, stop strings, log-probabilities.

answer = Answer(tokenizer, stops=("\\n\\n",), logprobs=2)
for token in generation:
    piece = answer.push(token)          # piece.text may be empty
    if answer.stopped: break
piece = answer.finish()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime_cpu.engine.sampling import Token
from runtime_cpu.text.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


@dataclass
class TokenLogprob:
    """One token's part of the answer's log-probabilities."""

    text: str
    raw: bytes
    logprob: float
    top: list[tuple[str, bytes, float]]
    offset: int

    def chat_entry(self) -> dict[str, Any]:
        """As in ``choices[].logprobs.content[]``."""
        return {
            "token": self.text,
            "logprob": self.logprob,
            "bytes": list(self.raw),
            "top_logprobs": [
                {"token": text, "logprob": logprob, "bytes": list(raw)} for text, raw, logprob in self.top
            ],
        }


@dataclass
class Piece:
    """Text that became final, with the log-probabilities of the tokens behind it."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Answer:
    """Assembles one answer.

    Text is held back while it could be the beginning of a stop string, and while a character is incomplete.

    Attributes:
        stopped: a stop string was met; further tokens are not wanted.
        tokens: how many were taken.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), logprobs: int | None = None) -> None:
        self.stopped = False
        self.tokens = 0
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._logprobs = logprobs
        self._stream = tokenizer.stream()
        self._held = ""
        self._entries: list[TokenLogprob] = []
        self._offset = 0

    def push(self, token: Token) -> Piece:
        """Take one token; returns what became final."""
        assert not self.stopped, "an answer that has stopped takes no more tokens"
        self.tokens += 1
        text = self._stream.push(token.id)
        if self._logprobs is not None:
            self._entries.append(self._entry(token, self._logprobs))
        self._offset += len(text)
        self._held += text
        return self._release(final=False)

    def finish(self) -> Piece:
        """What is left at the end."""
        if self.stopped:
            return Piece()
        self._held += self._stream.finish()
        return self._release(final=True)

    def _release(self, final: bool) -> Piece:
        cut = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            text, self._held = self._held[:cut], ""
        else:
            keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if not text and not (final or self.stopped):
            return Piece()
        entries, self._entries = self._entries, []
        return Piece(text, entries)

    def _entry(self, token: Token, count: int) -> TokenLogprob:
        raw = self._tokenizer.token_bytes(token.id)
        top = []
        for token_id, logprob in token.top[:count]:
            other = self._tokenizer.token_bytes(token_id)
            top.append((other.decode("utf-8", "replace"), other, max(logprob, _LEAST_LOGPROB)))
        return TokenLogprob(
            raw.decode("utf-8", "replace"), raw, max(token.logprob, _LEAST_LOGPROB), top, self._offset
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
