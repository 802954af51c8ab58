"""Asks the teacher: ``LiveClient(teacher, config, ledger, seed).ask(key, messages, …)``, and ``ReplayClient`` again.

Items are coroutines that ask one question or several (``items.py``). They run twice: live, many at once, to fill the
ledger with answers; then, in the order of selection, from the ledger alone, for what is kept. So memory does not grow
with the number of items, the order of answers does not matter, and a killed run continues where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import openai

from components.artifacts import StageError
from components.synthesis.config import TeacherConfig
from components.synthesis.prompts import Message
from components.synthesis.teacher.ledger import Answer, Ledger, digest_of
from components.synthesis.teacher.preflight import ALTERNATIVES
from components.synthesis.teacher.teacher import Teacher

_LONGEST_REASON = 300
IN_FLIGHT_GRACE_S = 12.0  # for requests in flight at the time limit


class Rejected(Exception):
    """An item ends here; ``reason`` is counted, ``example`` may be shown."""

    def __init__(self, reason: str, example: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.example = example


class Client(Protocol):
    """What an item needs to ask."""

    async def ask(
        self,
        key: str,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float,
        schema: dict[str, Any] | None = None,
    ) -> Answer:
        """The teacher's answer.

        Raises:
            Rejected: there is none (``out_of_time``, ``request_failed``).
        """
        ...


def _payload(
    model: str,
    key: str,
    seed: int,
    messages: list[Message],
    max_tokens: int,
    temperature: float,
    frequency_penalty: float,
    schema: dict[str, Any] | None,
) -> dict[str, Any]:
    request_seed = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "big") >> 1
    payload: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "frequency_penalty": frequency_penalty,
        "seed": request_seed,
    }
    if schema is not None:
        payload["response_format"] = schema
    return payload


class ReplayClient:
    """Answers from the ledger; what is missing there was not asked in time."""

    def __init__(self, model: str, config: TeacherConfig, ledger: Ledger, seed: int):
        self._model, self._config, self._ledger, self._seed = model, config, ledger, seed

    async def ask(
        self,
        key: str,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float,
        schema: dict[str, Any] | None = None,
    ) -> Answer:
        """See :class:`Client`."""
        payload = _payload(
            self._model,
            key,
            self._seed,
            messages,
            max_tokens,
            temperature,
            self._config.frequency_penalty,
            schema,
        )
        answer = self._ledger.get(key, digest_of(payload))
        if answer is None:
            raise Rejected("out_of_time")
        if answer.failed:
            raise Rejected("request_failed", answer.text)
        return answer


class LiveClient:
    """Answers from the ledger or from the teacher, until ``deadline``.

    Args:
        on_answer: called after every new answer, with its completion tokens.
        deadline: ``time.monotonic()`` after which nothing new is asked.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: TeacherConfig,
        ledger: Ledger,
        seed: int,
        deadline: float | None = None,
        on_answer: Callable[[int], None] = lambda tokens: None,
    ):
        self._teacher, self._config, self._ledger, self._seed = teacher, config, ledger, seed
        self._deadline, self._on_answer = deadline, on_answer
        self._failures = 0
        local = teacher.server is not None
        self._openai = openai.AsyncOpenAI(
            base_url=teacher.base_url,
            api_key=teacher.key,
            timeout=config.request_timeout_s,
            max_retries=config.retries,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not local),
        )

    async def ask(
        self,
        key: str,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float,
        schema: dict[str, Any] | None = None,
    ) -> Answer:
        """See :class:`Client`.

        Raises:
            StageError: the teacher is gone, refuses us, or fails again and again.
        """
        payload = _payload(
            self._teacher.model,
            key,
            self._seed,
            messages,
            max_tokens,
            temperature,
            self._config.frequency_penalty,
            schema,
        )
        digest = digest_of(payload)
        answer = self._ledger.get(key, digest)
        if answer is None or answer.failed:
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise Rejected("out_of_time")
            try:
                async with asyncio.timeout(self._left()):
                    answer = await self._request(payload)
            except TimeoutError as error:
                raise Rejected("out_of_time") from error
            self._ledger.put(key, digest, answer)
            self._on_answer(answer.completion_tokens)
        if answer.failed:
            raise Rejected("request_failed", answer.text)
        return answer

    def _left(self) -> float | None:
        return None if self._deadline is None else self._deadline + IN_FLIGHT_GRACE_S - time.monotonic()

    async def _request(self, payload: dict[str, Any]) -> Answer:
        where = f"the teacher at {self._teacher.base_url}"
        try:
            answer = _read(await self._openai.chat.completions.create(**payload))
        except openai.APITimeoutError:
            answer = Answer(f"no answer within {self._config.request_timeout_s:g} s", "failed")
        except openai.APIConnectionError as error:
            if self._teacher.server is not None:
                self._teacher.server.check_alive()
            answer = Answer(f"connection failed: {error.__cause__ or error}", "failed")
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise StageError(
                f"{where} refused the key (HTTP {error.status_code}); put a valid one into the environment "
                f"variable {self._config.api_key_env}"
            ) from error
        except openai.NotFoundError as error:
            raise StageError(
                f"{where} does not know the model {self._teacher.model!r} or the path (HTTP 404): "
                f"{str(error)[:_LONGEST_REASON]}"
            ) from error
        except openai.APIStatusError as error:
            answer = Answer(f"HTTP {error.status_code}: {str(error)[:_LONGEST_REASON]}", "failed")
        except (openai.APIError, ValueError) as error:
            answer = Answer(f"malformed answer: {str(error)[:_LONGEST_REASON]}", "failed")
        self._failures = self._failures + 1 if answer.failed else 0
        if self._failures >= self.failure_limit:
            raise StageError(
                f"{where} failed {self._failures} times in a row, the last time with: {answer.text}. The answers so "
                f"far are kept; the same command goes on from them. {ALTERNATIVES}"
            )
        return answer

    @property
    def failure_limit(self) -> int:
        """Consecutive failures, each after its retries, that end the stage."""
        return max(8, 2 * self._config.concurrency)

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()


def _read(completion: Any) -> Answer:
    try:
        choice = completion.choices[0]
        text, finish = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"not a chat completion ({error})") from error
    if text is None:
        text = ""
    if not isinstance(text, str) or finish not in ("stop", "length"):
        raise ValueError(f"finish_reason {finish!r}")
    usage = completion.usage
    return Answer(
        text.encode("utf-8", "replace").decode(),
        finish,
        int(getattr(usage, "prompt_tokens", 0) or 0),
        int(getattr(usage, "completion_tokens", 0) or 0),
    )
