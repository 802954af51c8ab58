"""Request bodies, checked field by field: bytes in, a :class:`GenerationRequest` or an :class:`ApiError` out.

request = parse_chat(decode_json(body), vocab_size=151936)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from runtime_cpu.serve.errors import ApiError

MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 4096
ROLES = ("system", "developer", "user", "assistant", "tool")

# Fields of OpenAI's that change nothing here: accepted with any value.
_IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    }
)
# Fields that this server cannot honour: accepted only with the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
_SAMPLING_FIELDS = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "max_tokens",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "n",
        "logprobs",
    }
)
_CHAT_FIELDS = _SAMPLING_FIELDS | {"messages", "max_completion_tokens", "top_logprobs"}
_COMPLETION_FIELDS = _SAMPLING_FIELDS | {"prompt", "parse_special", "echo", "suffix", "best_of"}


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate from. One of ``messages`` (chat) and ``prompt`` (completion) is set.

    Attributes:
        prompt: text, or token ids.
        parse_special: whether control tokens written in a text prompt become those tokens.
        max_tokens: limit asked for; ``None``: as much as fits.
        stops: strings that end the answer and are not part of it.
        logprobs: ``None``, or how many alternatives to list beside each token's own log-probability.
    """

    model: str | None
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    parse_special: bool = True
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False

    def sampling(self) -> dict[str, Any]:
        """Arguments of ``Engine.generate`` except ``max_tokens``."""
        greedy = self.top_p == 0.0  # OpenAI allows 0: only the most probable token is left
        return {
            "temperature": 0.0 if greedy else self.temperature,
            "top_p": 1.0 if greedy else self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": None if self.seed is None else self.seed % 2**64,
            "logit_bias": dict(self.logit_bias),
            "logprobs": self.logprobs or 0,
        }


def decode_json(body: bytes) -> dict[str, Any]:
    """A JSON object from a request body.

    Raises:
        ApiError: 400, for anything else.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the request body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(
            400, f"the request body should be a JSON object, it is {_kind(value)}", code="invalid_json"
        )
    return value


def parse_chat(body: Mapping[str, Any], vocab_size: int) -> GenerationRequest:
    """Check a ``/v1/chat/completions`` body."""
    fields = _Fields(body, _CHAT_FIELDS)
    logprobs = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    limits = [fields.integer(name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")]
    given = [limit for limit in limits if limit is not None]
    if len(set(given)) > 1:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens differ; give one of them",
            param="max_completion_tokens",
        )
    return GenerationRequest(
        messages=_messages(fields),
        max_tokens=given[0] if given else None,
        logprobs=(top or 0) if logprobs else None,
        **_common(fields, vocab_size),
    )


def parse_completion(body: Mapping[str, Any], vocab_size: int) -> GenerationRequest:
    """Check a ``/v1/completions`` body."""
    fields = _Fields(body, _COMPLETION_FIELDS)
    if fields.boolean("echo", False):
        raise ApiError(400, "echo is not supported; only false is allowed", param="echo")
    if fields.get("suffix") not in (None, ""):
        raise ApiError(400, "suffix is not supported; leave it out", param="suffix")
    fields.integer("best_of", 1, 1)
    max_tokens = fields.integer("max_tokens", 1, 2**31 - 1)
    return GenerationRequest(
        prompt=_prompt(fields, vocab_size),
        parse_special=fields.boolean("parse_special", True),
        max_tokens=16 if max_tokens is None else max_tokens,  # OpenAI's default for this route
        logprobs=fields.integer("logprobs", 0, MAX_TOP_LOGPROBS),
        **_common(fields, vocab_size),
    )


class _Fields:
    """Typed access to a body's fields. ``null`` counts as absent, as OpenAI's clients send it so."""

    def __init__(self, body: Mapping[str, Any], known: frozenset[str]) -> None:
        self._body = body
        for name, value in body.items():
            if name in known or name in _IGNORED or value is None:
                continue
            if name not in _NEUTRAL:
                raise ApiError(400, f"unrecognized request argument: {_shown(name)}", param=str(name)[:64])
            if value not in _NEUTRAL[name]:
                allowed = " or ".join([*(json.dumps(choice) for choice in _NEUTRAL[name]), "null"])
                raise ApiError(400, f"{name} is not supported; allowed is {allowed}", param=name)

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} should be true or false, it is {_shown(value)}", param=name)
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            allowed = str(low) if low == high else f"a whole number from {low} to {high}"
            raise ApiError(400, f"{name} is {_shown(value)}; allowed is {allowed}", param=name)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.get(name)
        return default if value is None else _number(name, value, low, high)

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise ApiError(400, f"{name} should be text, it is {_kind(value)}", param=name)
        return value


def _common(fields: _Fields, vocab_size: int) -> dict[str, Any]:
    fields.integer("n", 1, 1)
    stream = fields.boolean("stream", False)
    top_k = fields.integer("top_k", -1, 2**31 - 1)
    return {
        "model": fields.text("model"),
        "temperature": fields.number("temperature", 0, 2, 1.0),
        "top_p": fields.number("top_p", 0, 1, 1.0),
        "top_k": max(top_k or 0, 0),
        "min_p": fields.number("min_p", 0, 1, 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 10, 1.0),
        "presence_penalty": fields.number("presence_penalty", -2, 2, 0.0),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2, 0.0),
        "seed": fields.integer("seed", -(2**63), 2**64 - 1),
        "stops": _stops(fields.get("stop")),
        "logit_bias": _logit_bias(fields.get("logit_bias"), vocab_size),
        "stream": stream,
        "include_usage": _include_usage(fields.get("stream_options"), stream),
    }


def _messages(fields: _Fields) -> tuple[Mapping[str, Any], ...]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(
            400,
            f"messages should be a list of at least one message, it is {_kind(messages)}",
            param="messages",
        )
    if len(messages) > MAX_MESSAGES:
        raise ApiError(
            400, f"there are {len(messages)} messages; at most {MAX_MESSAGES} are allowed", param="messages"
        )
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(messages))


def _message(where: str, message: Any) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(
            400, f"{where} should be an object with role and content, it is {_kind(message)}", param=where
        )
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(
            400, f"{where}.role is {_shown(role)}; allowed are {', '.join(ROLES)}", param=f"{where}.role"
        )
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise ApiError(400, f"{where}.{name} is not supported", param=f"{where}.{name}")
    # The family's templates know no developer; OpenAI says that it takes the system's place.
    return {
        "role": "system" if role == "developer" else role,
        "content": _content(f"{where}.content", message.get("content")),
    }


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where} should be text or a list of text parts, it is {_kind(content)}", param=where
        )
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                400,
                f'{where}[{index}] should be {{"type": "text", "text": …}}; this model reads text only',
                param=f"{where}[{index}]",
            )
        parts.append(part["text"])
    return "".join(parts)


def _prompt(fields: _Fields, vocab_size: int) -> str | tuple[int, ...]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and not any(isinstance(item, (str, list)) for item in prompt):
        for index, item in enumerate(prompt):
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                raise ApiError(
                    400,
                    f"prompt[{index}] is {_shown(item)}; allowed is a token id from 0 to {vocab_size - 1}",
                    param=f"prompt[{index}]",
                )
        return tuple(prompt)
    raise ApiError(
        400,
        "prompt should be one text or one list of token ids; send several prompts one by one",
        param="prompt",
    )


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ApiError(400, f"stop should be text or a list of at most {MAX_STOPS} texts", param="stop")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise ApiError(
                400,
                f"stop[{index}] is {_shown(stop)}; it should be a text of 1 to {MAX_STOP_CHARACTERS} characters",
                param="stop",
            )
    return tuple(stops)


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise ApiError(
            400, f"logit_bias should map at most {MAX_LOGIT_BIAS} token ids to numbers", param="logit_bias"
        )
    result = {}
    for key, bias in value.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
        if not 0 <= token_id < vocab_size:
            raise ApiError(
                400,
                f"logit_bias names {_shown(key)}; allowed is a token id from 0 to {vocab_size - 1}",
                param="logit_bias",
            )
        result[token_id] = _number(f"logit_bias[{token_id}]", bias, -100, 100, param="logit_bias")
    return result


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    if not isinstance(value, dict) or not isinstance(value.get("include_usage", False), bool):
        raise ApiError(
            400,
            'stream_options should be {"include_usage": true} or false',
            param="stream_options.include_usage",
        )
    return bool(value.get("include_usage", False))


def _number(name: str, value: Any, low: float, high: float, param: str | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ApiError(400, f"{name} is {_shown(value)}; allowed is {low:g} to {high:g}", param=param or name)
    number = float(value)
    assert math.isfinite(number)
    return number


def _shown(value: Any) -> str:
    """A short form of what was sent."""
    if isinstance(value, (dict, list)):
        return _kind(value)
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {dict: "an object", str: "text", bool: "a truth value", type(None): "missing"}
    return names.get(type(value), "a number")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
