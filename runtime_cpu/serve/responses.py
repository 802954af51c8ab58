"""JSON bodies of answers in OpenAI's shapes, whole and in chunks.

shape = ChatShape(model="nano", include_usage=True)
shape.chunk(piece); shape.last_chunk("stop"); shape.usage_chunk(stats, tokens); shape.whole(...)
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from runtime_cpu.engine.stats import Stats
from runtime_cpu.serve.answer import TokenLogprob


class ChatShape:
    """``chat.completion`` and ``chat.completion.chunk``."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, model: str, include_usage: bool, with_logprobs: bool) -> None:
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }
        self._include_usage = include_usage
        self._with_logprobs = with_logprobs

    def first_chunk(self) -> dict[str, Any] | None:
        """What opens a stream."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """A piece of the answer."""
        return self._chunk({"delta": {"content": text}}, logprobs, None)

    def last_chunk(self, finish_reason: str) -> dict[str, Any]:
        """The chunk that says why the answer ended."""
        return self._chunk({"delta": {}}, None, finish_reason)

    def usage_chunk(self, stats: Stats, completion_tokens: int) -> dict[str, Any]:
        """The closing chunk of ``include_usage``, with our own ``timings`` beside the usage."""
        return {
            **self._head,
            "object": self.chunk_object,
            "choices": [],
            "usage": usage(stats, completion_tokens),
            "timings": timings(stats),
        }

    def whole(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish_reason: str,
        stats: Stats,
        completion_tokens: int,
    ) -> dict[str, Any]:
        """A complete answer."""
        return {
            **self._head,
            "object": self.whole_object,
            "choices": [
                {
                    "index": 0,
                    **self._whole_text(text),
                    "logprobs": self._logprobs(logprobs) if self._with_logprobs else None,
                    "finish_reason": finish_reason,
                }
            ],
            "usage": usage(stats, completion_tokens),
            "timings": timings(stats),
        }

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"content": [entry.chat_entry() for entry in entries], "refusal": None}

    def _chunk(
        self, text: dict[str, Any], logprobs: Sequence[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            **text,
            "logprobs": self._logprobs(logprobs) if self._with_logprobs and logprobs is not None else None,
            "finish_reason": finish_reason,
        }
        body = {**self._head, "object": self.chunk_object, "choices": [choice]}
        return {**body, "usage": None} if self._include_usage else body


class CompletionShape(ChatShape):
    """``text_completion``, whole and in chunks."""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def first_chunk(self) -> dict[str, Any] | None:
        """Completions open without one."""
        return None

    def chunk(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """A piece of the answer."""
        return self._chunk({"text": text}, logprobs, None)

    def last_chunk(self, finish_reason: str) -> dict[str, Any]:
        """The chunk that says why the answer ended."""
        return self._chunk({"text": ""}, None, finish_reason)

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{text: logprob for text, _, logprob in entry.top} for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }


def usage(stats: Stats, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's ``usage``."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": stats.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
    }


def timings(stats: Stats) -> dict[str, float]:
    """Speeds of this answer; not part of OpenAI's protocol."""
    return {
        "first_token_s": round(stats.first_token_s, 6),
        "prompt_tokens_per_s": round(stats.prompt_tokens_per_s, 3),
        "decode_tokens_per_s": round(stats.decode_tokens_per_s, 3),
    }
