"""Turns a conversation into the model's prompt with the chat template inside the file.

    template = ChatTemplate.from_metadata(metadata, tokenizer)
    ids = template.encode([{"role": "user", "content": "Hello"}])

Two dangers are kept out. The template is a program from a model file: it runs in jinja2's immutable sandbox with a
budget of steps. The messages come from users: their text must never become control tokens, whatever it says. While
the template runs, the characters of control tokens inside messages are replaced by private-use stand-ins; the
rendered text is cut at control tokens (all of which the template wrote), and only then do the stand-ins turn back.
"""

from __future__ import annotations

import contextvars
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime_cpu.text.tokenizer import Tokenizer

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MAX_TEMPLATE_CHARACTERS = 1 << 18
_MAX_RENDERED_CHARACTERS = 1 << 24
_MAX_STEPS = 200_000
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # plane 15: characters that Unicode never assigns
_ROLE = re.compile(r"[A-Za-z_]{1,32}")

_steps_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps_left")


class ChatTemplateError(ValueError):
    """The template is no valid program, or it refused the conversation; the message repeats its reason."""


class ChatTemplate:
    """A compiled chat template, bound to the tokenizer whose control tokens it writes."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Compile ``source``.

        Raises:
            ChatTemplateError: it is no valid jinja2 template or longer than 256 Ki characters.
        """
        if len(source) > _MAX_TEMPLATE_CHARACTERS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters; at most {_MAX_TEMPLATE_CHARACTERS} are allowed"
            )
        self.source = source
        self._tokenizer = tokenizer
        try:
            self._template = _Sandbox().from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The file's ``tokenizer.chat_template``; ChatML when it has none."""
        source = metadata.get("tokenizer.chat_template", CHATML_TEMPLATE)
        if not isinstance(source, str):
            raise ChatTemplateError(f"tokenizer.chat_template should be text, it is {type(source).__name__}")
        return cls(source, tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text, to look at. Feed the model with :meth:`encode`, which keeps user text harmless."""
        guard = _Guard(self._tokenizer.control_tokens, [messages, variables])
        return guard.restore(self._render(guard, messages, add_generation_prompt, variables))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt as ids. Control tokens come from the template alone, never from a message's text.

        Args:
            messages: ``{"role": …, "content": …}`` and whatever else the template reads.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further names for the template.

        Raises:
            ChatTemplateError: the template refuses the conversation, fails, or exceeds its budget.
        """
        guard = _Guard(self._tokenizer.control_tokens, [messages, variables])
        rendered = self._render(guard, messages, add_generation_prompt, variables)
        ids: list[int] = [self._tokenizer.bos_id] if self._needs_bos(rendered) else []  # type: ignore[list-item]
        for piece, control_id in self._tokenizer.split_control(rendered):
            if control_id is not None:
                ids.append(control_id)
            else:
                ids.extend(self._tokenizer.encode(guard.restore(piece), add_bos=False))
        return ids

    def _needs_bos(self, rendered: str) -> bool:
        tokenizer = self._tokenizer
        return tokenizer.add_bos and not rendered.startswith(self._text_of(tokenizer.bos_id) or "\0")

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _render(
        self,
        guard: _Guard,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> str:
        guarded = []
        for index, message in enumerate(messages):
            role = message.get("role")
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise ChatTemplateError(
                    f"messages[{index}].role is {role!r}; it should be a short word such as 'user'"
                )
            guarded.append({**{key: guard.protect(value) for key, value in message.items()}, "role": role})
        token = _steps_left.set([_MAX_STEPS])
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                **{key: guard.protect(value) for key, value in (variables or {}).items()},
                messages=guarded,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._text_of(self._tokenizer.bos_id),
                eos_token=self._text_of(self._tokenizer.eos_id),
            ):
                parts.append(part)
                size += len(part)
                if size > _MAX_RENDERED_CHARACTERS:
                    raise ChatTemplateError("the chat template writes more than 16 Mi characters")
        except ChatTemplateError:
            raise
        except Exception as error:  # the template is a program of the file's: it may raise anything
            raise ChatTemplateError(f"the chat template failed: {error}") from error
        finally:
            _steps_left.reset(token)
        return "".join(parts)


class _Guard:
    """Replaces what could form a control token inside users' text, and puts it back.

    Every ``|`` becomes a stand-in, which breaks all tokens of the ``<|name|>`` kind even when the template cuts a
    message and joins the rest. Control tokens without ``|`` get a stand-in after their first character.
    """

    def __init__(self, control_tokens: Iterable[str], values: Any) -> None:
        used = set(json.dumps(values, ensure_ascii=False, default=str))
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        self._bar, self._break = next(free), next(free)
        others = sorted((text for text in control_tokens if "|" not in text), key=len, reverse=True)
        self._others = re.compile("|".join(f"(?={re.escape(text)})" for text in others)) if others else None

    def protect(self, value: Any) -> Any:
        if isinstance(value, str):
            if self._others is not None:
                starts = [match.start() for match in self._others.finditer(value)]
                for start in reversed(starts):
                    value = value[: start + 1] + self._break + value[start + 1 :]
            return value.replace("|", self._bar)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.protect(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        return text.replace(self._break, "").replace(self._bar, "|")


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's text for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox of Hugging Face's templates (same options, filters and globals) with a budget of steps.

    One step is one round of a loop, one call, or one item of a product such as ``"-" * 80``.
    """

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        self.filters["tojson"] = _to_json
        self.filters["_bounded"] = _bounded
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(
                loop.iter, "_bounded", [], [], None, None, lineno=loop.lineno, environment=self
            )
        return tree

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _spend(1)
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise ChatTemplateError("the chat template raises to a power, which is not allowed")
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                _spend(len(sequence) * max(count, 0))
        return super().call_binop(context, operator, left, right)


def _spend(steps: int) -> None:
    left = _steps_left.get(None)
    if left is None:  # compile-time constant folding
        return
    left[0] -= steps
    if left[0] < 0:
        raise ChatTemplateError(f"the chat template takes more than {_MAX_STEPS} steps")


def _bounded(items: Any) -> list[Any]:
    result = list(items)
    _spend(len(result))
    return result


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(f"the chat template refuses the conversation: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
