"""A conversation in the terminal: ``python -m runtime_cpu.chat MODEL``.

Ctrl-C stops an answer; /reset forgets the conversation, /stats shows the last answer's cost, /quit ends.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from pathlib import Path
from typing import TextIO

from runtime_cpu._core import EngineError
from runtime_cpu.console import add_kv_option
from runtime_cpu.engine.engine import Engine
from runtime_cpu.engine.head_predictor import HEADS
from runtime_cpu.engine.stats import Stats
from runtime_cpu.memory.plan import format_bytes
from runtime_cpu.text.chat_template import ChatTemplateError
from runtime_cpu.text.tokenizer import TokenizerError

_HELP = """/reset  forget the conversation
/stats  speed and memory of the last answer
/quit   end (Ctrl-D does too); Ctrl-C stops an answer"""


class Conversation:
    """Messages so far and the engine that answers them."""

    def __init__(
        self, engine: Engine, system: str | None, max_tokens: int | None, sampling: dict[str, float]
    ) -> None:
        self._engine = engine
        self._template = engine.chat_template
        self._opening = [{"role": "system", "content": system}] if system else []
        self._max_tokens = max_tokens
        self._sampling = sampling
        self.messages = list(self._opening)
        self.stats: Stats | None = None

    def reset(self) -> None:
        """Forget everything but the instructions."""
        self.messages = list(self._opening)

    def ask(self, text: str, out: TextIO) -> None:
        """Answer ``text``, writing to ``out`` as it comes. KeyboardInterrupt ends the answer and keeps what came.

        Raises:
            ChatTemplateError: the template refuses the conversation.
            ValueError: it no longer fits into the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.encode(messages)
        room = self._engine.info.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens and the context is {self._engine.info.context}; "
                "/reset begins a new one"
            )
        decoder = self._engine.tokenizer.stream()
        parts: list[str] = []

        def show(piece: str) -> None:
            parts.append(piece)
            out.write(piece)
            out.flush()

        limit = room if self._max_tokens is None else min(self._max_tokens, room)
        with self._engine.generate(prompt, limit, **self._sampling) as generation:  # type: ignore[arg-type]
            self.stats = generation.stats
            with contextlib.suppress(KeyboardInterrupt):
                for token in generation:
                    show(decoder.push(token.id))
            show(decoder.finish())
        answer = "".join(parts)
        if answer:
            self.messages = [*messages, {"role": "assistant", "content": answer}]


def describe(stats: Stats) -> str:
    """The cost of an answer in two lines."""
    return (
        f"prompt {stats.prompt_tokens} tokens ({stats.reused_tokens} reused) at {stats.prompt_tokens_per_s:.1f}/s, "
        f"first token after {stats.first_token_s:.3f} s\n"
        f"answer {stats.generated_tokens} tokens at {stats.decode_tokens_per_s:.1f}/s, ended by {stats.finish_reason}; "
        f"{stats.active_neuron_share:.0%} of expert neurons active, peak memory {format_bytes(stats.peak_rss_bytes)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Converse until /quit or the end of the input. Exit code 2: the model or an option is unusable."""
    parser = argparse.ArgumentParser(prog="python -m runtime_cpu.chat", description="Chat with a GGUF model.")
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--system", help="instructions for the model")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0: always the likeliest (default: 0.7)"
    )
    parser.add_argument("--top-p", type=float, default=0.95, help="default: 0.95")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: what fits)")
    parser.add_argument("--seed", type=int, help="makes the answers reproducible")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--memory", help="limit for everything, such as 1GiB")
    add_kv_option(parser)
    parser.add_argument(
        "--head", choices=HEADS, default="exact", help="predictor: faster, and it can lose tokens"
    )
    options = parser.parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    try:
        engine = Engine.open(
            options.model,
            options.threads,
            options.context,
            options.memory,
            kv_type=options.kv,
            sessions=1,
            head=options.head,
        )
        conversation = Conversation(engine, options.system, options.max_tokens, sampling)
        engine.generate([0], options.max_tokens, **sampling).close()  # checks the options before anyone types
    except (OSError, EngineError, TokenizerError, ChatTemplateError, ValueError) as error:
        _tell(f"error: {error}")
        return 2
    info = engine.info
    _tell(
        f"{options.model.name}: {info.parameters / 1e6:.1f} M parameters, {info.file_type}, {info.threads} threads, "
        f"context {info.context}. /help lists the commands."
    )
    if info.head == "predictor":
        _tell(f"predicted head: {info.head_predictor}")
    with engine:
        _converse(conversation)
    return 0


def _converse(conversation: Conversation) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input())
    while True:
        try:
            line = input("\n> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _tell("\n/quit ends")
            continue
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            conversation.reset()
            _tell("a new conversation")
        elif line == "/stats":
            _tell(describe(conversation.stats) if conversation.stats else "no answer yet")
        elif line.startswith("/"):
            _tell(_HELP)
        elif line:
            try:
                conversation.ask(line, sys.stdout)
            except (ChatTemplateError, ValueError, EngineError) as error:
                _tell(f"error: {error}")
            except KeyboardInterrupt:
                _tell("")
            sys.stdout.write("\n")
            sys.stdout.flush()


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
