"""The HTTP application: routes, limits and the way from a request to the engine and back.

app = build_app(engine, ServerSettings(model_name="nano"))      # an ASGI application
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime_cpu.engine.engine import Engine
from runtime_cpu.serve.answer import Answer, TokenLogprob
from runtime_cpu.serve.errors import ApiError
from runtime_cpu.serve.metrics import ServerMetrics
from runtime_cpu.serve.parameters import (
    GenerationRequest,
    decode_json,
    parse_chat,
    parse_completion,
)
from runtime_cpu.serve.responses import ChatShape, CompletionShape
from runtime_cpu.serve.worker import Ticket, Worker
from runtime_cpu.text.chat_template import ChatTemplateError

_log = logging.getLogger("runtime_cpu.serve")
_CLOSED_BY_CLIENT = 499  # nginx's number; never sent, only counted


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves.

    Attributes:
        model_name: what ``/v1/models`` lists and the ``model`` field has to be, when given.
        api_key: asked for as ``Authorization: Bearer …`` on every route but ``/`` and ``/health``.
        allowed_hosts: names accepted in ``Host`` (DNS rebinding); ``None``: any.
        max_waiting: requests that may wait while ``parallel`` of them run, their steps computed together.
        max_body_bytes: limit of a request's body.
        body_timeout_s: how long one may take to arrive.
    """

    model_name: str
    api_key: str | None = None
    allowed_hosts: frozenset[str] | None = None
    max_waiting: int = 8
    parallel: int = 1
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0


def build_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """The application for one open engine. Closing the application cancels what runs; the engine stays open."""
    service = _Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/health", service.health),
            Route("/metrics", service.metrics_text),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.completion, methods=["POST"]),
        ],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_defect},
        lifespan=lifespan,
    )
    app.add_middleware(_Gate, settings=settings, metrics=service.metrics)
    return app


class _Service:
    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = ServerMetrics()
        self.worker = Worker(engine, self.metrics, settings.max_waiting, settings.parallel)
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._template = engine.chat_template
        self._created = int(time.time())
        self._page, self._page_headers = _load_page()

    async def page(self, _: Request) -> Response:
        return HTMLResponse(self._page, headers=self._page_headers)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.settings.model_name})

    async def metrics_text(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_entry()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_entry())

    async def chat(self, request: Request) -> Response:
        parsed = parse_chat(await self._body(request), self._engine.info.vocab_size)
        return await self._answer(request, parsed, ChatShape)

    async def completion(self, request: Request) -> Response:
        parsed = parse_completion(await self._body(request), self._engine.info.vocab_size)
        return await self._answer(request, parsed, CompletionShape)

    def _model_entry(self) -> dict[str, Any]:
        info = self._engine.info
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "smallthinker",
            "context": info.context,
            "file_type": info.file_type,
            "parameters": info.parameters,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; this server runs {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def _body(self, request: Request) -> dict[str, Any]:
        limit = self.settings.max_body_bytes
        too_large = ApiError(413, f"the request body is larger than {limit} bytes", code="request_too_large")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408, f"the request body did not arrive within {self.settings.body_timeout_s:g} s"
            ) from None
        return decode_json(bytes(body))

    async def _answer(
        self, request: Request, parsed: GenerationRequest, shape_type: type[ChatShape]
    ) -> Response:
        self._check_model(parsed.model)
        ticket = self.worker.admit()
        try:
            prompt = await asyncio.to_thread(self._encode, parsed)
            limit = self._limit(parsed, len(prompt))
        except BaseException:
            ticket.__exit__(None, None, None)
            raise
        shape = shape_type(self.settings.model_name, parsed.include_usage, parsed.logprobs is not None)
        answering = _Answering(ticket, prompt, limit, parsed, self._tokenizer_answer(parsed), shape)
        return _StreamingAnswer(answering) if parsed.stream else _WholeAnswer(answering)

    def _tokenizer_answer(self, parsed: GenerationRequest) -> Answer:
        return Answer(self._tokenizer, parsed.stops, parsed.logprobs)

    def _encode(self, parsed: GenerationRequest) -> Sequence[int]:
        if parsed.messages is not None:
            size = sum(len(message["content"]) for message in parsed.messages)
            self._check_characters(size, "messages")
            try:
                return self._template.encode(parsed.messages)
            except ChatTemplateError as error:
                raise ApiError(400, str(error), param="messages") from error
        if isinstance(parsed.prompt, str):
            self._check_characters(len(parsed.prompt), "prompt")
            ids = self._tokenizer.encode(parsed.prompt, parse_special=parsed.parse_special)
            if not ids:
                raise ApiError(400, "prompt is empty; it should have at least one token", param="prompt")
            return ids
        assert parsed.prompt is not None
        return parsed.prompt

    def _check_characters(self, size: int, param: str) -> None:
        # A character is at least a byte, so so many characters cannot fit, whatever they are.
        at_least = size // self._tokenizer.longest_token_bytes
        if at_least > self._engine.info.context:
            raise self._too_long(f"at least {at_least}", None, param)

    def _limit(self, parsed: GenerationRequest, prompt_tokens: int) -> int:
        room = self._engine.info.context - prompt_tokens
        if room < 1 or (parsed.max_tokens is not None and parsed.max_tokens > room):
            param = "messages" if parsed.messages is not None else "prompt"
            raise self._too_long(str(prompt_tokens), parsed.max_tokens, param)
        return room if parsed.max_tokens is None else parsed.max_tokens

    def _too_long(self, prompt_tokens: str, max_tokens: int | None, param: str) -> ApiError:
        asked = "" if max_tokens is None else f" and {max_tokens} in the answer"
        return ApiError(
            400,
            f"this server's context is {self._engine.info.context} tokens; you asked for {prompt_tokens} in the "
            f"{param}{asked}, and the answer needs at least 1. Shorten them, or lower max_tokens",
            param=param,
            code="context_length_exceeded",
        )


@dataclass
class _Answering:
    """One answer in the making."""

    ticket: Ticket
    prompt: Sequence[int]
    max_tokens: int
    request: GenerationRequest
    answer: Answer
    shape: ChatShape

    async def pieces(self) -> AsyncIterator[tuple[str, list[TokenLogprob]] | None]:
        """Texts with their log-probabilities as they become final; ``None`` when time goes by without any."""
        options = self.request.sampling()
        run = self.ticket.run(self.prompt, max_tokens=self.max_tokens, **options)
        try:
            async for tokens in run:
                if not tokens:
                    yield None
                text, logprobs = "", []
                for token in tokens:
                    piece = self.answer.push(token)
                    text += piece.text
                    logprobs += piece.logprobs
                    if self.answer.stopped:
                        break
                if text or logprobs:
                    yield text, logprobs
                if self.answer.stopped:
                    return
        finally:
            await run.aclose()  # type: ignore[attr-defined]
        rest = self.answer.finish()
        if rest.text or rest.logprobs:
            yield rest.text, rest.logprobs

    @property
    def finish_reason(self) -> str:
        return "stop" if self.answer.stopped else self.ticket.stats.finish_reason or "stop"


class _WholeAnswer(Response):
    """Answers in one piece; gives up when the client goes away."""

    def __init__(self, answering: _Answering) -> None:
        self._answering = answering
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answering.ticket:
            response = await _unless_disconnected(receive, self._collect())
            if response is not None:
                await response(scope, receive, send)

    async def _collect(self) -> Response:
        answering = self._answering
        text, logprobs = "", []
        try:
            async for piece in answering.pieces():
                if piece is not None:
                    text += piece[0]
                    logprobs += piece[1]
        except Exception:
            _log.exception("a generation failed")
            return _engine_failed().response()
        return JSONResponse(
            answering.shape.whole(
                text, logprobs, answering.finish_reason, answering.ticket.stats, answering.answer.tokens
            )
        )


class _StreamingAnswer(Response):
    """Answers as server-sent events; gives up when the client goes away."""

    def __init__(self, answering: _Answering) -> None:
        self._answering = answering
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answering.ticket:
            await _unless_disconnected(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                ],
            }
        )

        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        answering = self._answering
        shape = answering.shape
        try:
            if (first := shape.first_chunk()) is not None:
                await write(_event(first))
            async for piece in answering.pieces():
                await write(": waiting\n\n" if piece is None else _event(shape.chunk(*piece)))
        except OSError:  # the connection broke under a write
            return
        except Exception:
            _log.exception("a generation failed")
            await write(_event(_engine_failed().body()), more=False)
            return
        await write(_event(shape.last_chunk(answering.finish_reason)))
        if answering.request.include_usage:
            await write(_event(shape.usage_chunk(answering.ticket.stats, answering.answer.tokens)))
        await write("data: [DONE]\n\n", more=False)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_disconnected(receive: Receive, work: Any) -> Any:
    """The result of ``work``; ``None``, with ``work`` cancelled, when the client disconnects first."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class _Gate:
    """Checks ``Host``, ``Origin`` and the API key before anything else, and counts answers."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _CLOSED_BY_CLIENT

        async def counting_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            request = Request(scope)
            refusal = self._refusal(request)
            if refusal is not None:
                await refusal.response()(scope, receive, counting_send)
            else:
                await self._app(scope, receive, counting_send)
        except ClientDisconnect:
            pass
        finally:
            self._metrics.count_request(_route_label(scope["path"]), status)

    def _refusal(self, request: Request) -> ApiError | None:
        host = request.headers.get("host", "")
        allowed = self._settings.allowed_hosts
        if allowed is not None and _host_name(host) not in allowed:
            return ApiError(
                403,
                f"this server does not answer to the host name {_host_name(host)[:100]!r}",
                code="wrong_host",
            )
        origin = request.headers.get("origin")
        if origin is not None and request.method not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            return ApiError(403, "requests from pages of other origins are refused", code="wrong_origin")
        key = self._settings.api_key
        if key is None or request.url.path in ("/", "/health"):
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
            return None
        return ApiError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _host_name(host: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:]*)(?::\d+)?", host)
    return match.group(1).lower() if match else host.lower()


_ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")


def _route_label(path: str) -> str:
    return path if path in _ROUTES else "other"  # a bounded number of labels


def _engine_failed() -> ApiError:
    return ApiError(
        500, "the engine failed on this request; the server's log has the details", code="engine_error"
    )


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is nothing at {request.url.path[:200]}",
        405: f"{request.method} is not allowed at {request.url.path[:200]}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _on_defect(_: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed on this request; its log has the details").response()


def _load_page() -> tuple[str, dict[str, str]]:
    """The chat page and headers that let it run its own script and style and nothing else."""
    page = resources.files("runtime_cpu.serve").joinpath("page.html").read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
