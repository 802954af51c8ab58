"""One request: an iterator of tokens that can be cancelled, with its statistics.

with engine.generate(ids, max_tokens=64) as generation:
    for token in generation:
        ...
generation.stats.decode_tokens_per_s
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from runtime_cpu.closing import ClosedAtExit
from runtime_cpu.engine.sampling import Token
from runtime_cpu.engine.stats import Stats


class Generation(ClosedAtExit, Iterator[Token]):
    """The iterator that :meth:`Engine.generate` returns. ``close()`` cancels; so does leaving the ``with`` block.

    Nothing is computed before the first ``next()``. It may be driven from changing threads, one at a time.
    """

    def __init__(self, tokens: Generator[Token, None, None], stats: Stats) -> None:
        """``tokens`` fills ``stats`` while it runs, and gives back what it holds when it is closed."""
        self.stats = stats
        self._tokens = tokens

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """Stop and free the sequence. Harmless when already finished."""
        self._tokens.close()
        if self.stats.finish_reason is None:
            self.stats.finish_reason = "cancelled"
