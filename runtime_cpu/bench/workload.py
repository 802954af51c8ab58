"""What is measured: the prompts, the answers, and the conditions of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OURS = "runtime_cpu"


class BenchError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True)
class Workload:
    """What to measure.

    Attributes:
        depth: tokens put into the context before the prompt, not timed.
        decode_tokens: tokens generated after the first; 0 measures prompts only.
        memory_bytes: limit of every process.
        text_like: prompts whose tokens share experts as those of text do, for files of :mod:`runtime_cpu.synth`;
            otherwise tokens are independent.
        kv_type, head: of our engine, as :meth:`Engine.open` takes them.
        peer_python: interpreter that has the peer's package; by default this one.
        peer_model: the file that the peer reads; by default ``model``.
    """

    model: Path
    thread_counts: Sequence[int]
    runs: int = 5
    prompt_tokens: int = 128
    decode_tokens: int = 64
    depth: int = 0
    engines: Sequence[str] = (OURS,)
    memory_bytes: int | None = None
    text_like: bool = False
    kv_type: str = "auto"
    head: str = "exact"
    peer_python: Path | None = None
    peer_model: Path | None = None

    @property
    def context(self) -> int:
        """Tokens that a sequence needs room for."""
        return self.depth + self.prompt_tokens + self.decode_tokens + 1
