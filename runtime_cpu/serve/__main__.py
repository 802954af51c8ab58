"""Serves one model over HTTP on this machine: ``python -m runtime_cpu.serve MODEL [--port 8080]``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import warnings
from pathlib import Path

import uvicorn

from runtime_cpu._core import EngineError
from runtime_cpu.console import add_kv_option
from runtime_cpu.engine.engine import Engine
from runtime_cpu.engine.head_predictor import HEADS
from runtime_cpu.memory.plan import format_bytes
from runtime_cpu.serve.app import ServerSettings, build_app
from runtime_cpu.text.chat_template import ChatTemplateError
from runtime_cpu.text.tokenizer import TokenizerError

KEY_VARIABLE = "SMALLTHINKER_API_KEY"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.serve",
        description="Serve a GGUF model with OpenAI's protocol and a chat page.",
    )
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8080, help="port; 0 picks a free one (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="computing threads (default: the cores allowed)")
    parser.add_argument(
        "--context", type=int, help="tokens of context (default: all that the model and memory allow)"
    )
    parser.add_argument("--memory", help="limit for everything, such as 1GiB (default: none)")
    add_kv_option(parser)
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="exact",
        help="rows of the output matrix that are computed: all, or those that the file's predictor names, which is "
        "faster and can lose tokens (default: %(default)s)",
    )
    parser.add_argument("--model-name", help="name in the API (default: the file's name)")
    parser.add_argument("--api-key", help=f"ask clients for this key (or set {KEY_VARIABLE})")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer to this Host name too (a proxy's)",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="requests answered at the same time, their steps computed together (default: %(default)s)",
    )
    parser.add_argument("--queue", type=int, default=8, help="requests that may wait (default: %(default)s)")
    parser.add_argument(
        "--grace", type=int, default=30, help="seconds to finish answers at shutdown (default: %(default)s)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or Ctrl-C. Exit code 2: the model or an option is unusable."""
    options = build_parser().parse_args(arguments)
    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    if options.host not in _LOOPBACK and key is None:
        return _refuse(
            f"{options.host} can be reached from other machines; give --api-key (or {KEY_VARIABLE}), "
            "or listen on 127.0.0.1"
        )
    if not 0 <= options.port <= 65535:
        return _refuse(f"--port is {options.port}; allowed is 0 to 65535")
    if not 1 <= options.parallel <= 64:
        return _refuse(f"--parallel is {options.parallel}; allowed is 1 to 64")
    if not 0 <= options.queue <= 10_000:
        return _refuse(f"--queue is {options.queue}; allowed is 0 to 10000")
    if not 0 <= options.grace <= 3600:
        return _refuse(f"--grace is {options.grace}; allowed is 0 to 3600")
    warnings.showwarning = _show_warning
    log = logging.getLogger("runtime_cpu.engine")  # the plan, before anything is loaded
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    try:
        engine = Engine.open(
            options.model,
            options.threads,
            options.context,
            options.memory,
            kv_type=options.kv,
            sessions=options.parallel,
            head=options.head,
        )
        settings = ServerSettings(
            model_name=options.model_name or options.model.stem,
            api_key=key,
            allowed_hosts=_LOOPBACK_NAMES | set(map(str.lower, options.allow_host))
            if options.host in _LOOPBACK
            else None,
            max_waiting=options.queue,
            parallel=options.parallel,
        )
        app = build_app(engine, settings)
    except (OSError, EngineError, TokenizerError, ChatTemplateError, ValueError) as error:
        return _refuse(_sentence(error, options.model))
    try:
        listener = socket.create_server(
            (options.host, options.port), family=socket.AF_INET6 if ":" in options.host else socket.AF_INET
        )
    except OSError as error:
        return _refuse(f"cannot listen on {options.host} port {options.port}: {error.strerror or error}")

    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    info = engine.info
    _say(
        f"{settings.model_name}: {info.parameters / 1e6:.1f} M parameters, {info.file_type}, {info.threads} threads, "
        f"context {info.context}, memory {format_bytes(info.plan.total_bytes)}"
    )
    if info.head == "predictor":
        _say(f"predicted head: {info.head_predictor}")
    _say(f"chat page   http://{host}:{port}/")
    _say(f"OpenAI API  http://{host}:{port}/v1")
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=options.grace,
            limit_concurrency=options.queue + options.parallel + 64,
        )
    )
    # uvicorn raises the signal again once it has shut down; this is the end that was asked for, not a failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    engine.close()
    _say("stopped")
    return 0


def _sentence(error: Exception, model: Path) -> str:
    if isinstance(error, PermissionError):
        return f"{model} may not be read by this user"
    return str(error)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"warning: {message}")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _refuse(sentence: str) -> int:
    _say(f"error: {sentence}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
