"""How well a model predicts given text: ``python -m runtime_cpu.perplexity MODEL TEXT_OR_TOKENS --window 512``.

    result = measure(engine, token_ids, window=512)
    result.perplexity, result.bits_per_byte

The tokens are cut into windows side by side. In each, every token but the first is predicted from those before it in
the same window, so a token sees at most ``window - 1`` others.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime_cpu._core import EngineError
from runtime_cpu.console import add_kv_option, show_window
from runtime_cpu.engine.engine import Engine
from runtime_cpu.text.token_files import read_tokens
from runtime_cpu.text.tokenizer import Tokenizer, TokenizerError

_ROWS = 64  # rows of logits turned to float64 at once


@dataclass(frozen=True)
class Perplexity:
    """The outcome.

    Attributes:
        tokens: how many were predicted; ``windows``: how many windows they came from.
        bytes: UTF-8 bytes that these tokens stand for (control tokens: none).
        nats_per_token: mean negative natural logarithm of the predicted probability.
        bits_per_byte: the same information per byte of text: comparable between tokenizers.
    """

    tokens: int
    windows: int
    window_tokens: int
    bytes: int
    nats_per_token: float
    duration_s: float

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """NaN when the tokens stand for no bytes."""
        return self.nats_per_token * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


def measure(
    engine: Engine,
    token_ids: Sequence[int] | NDArray[np.integer],
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Predict ``token_ids`` [T] in windows of ``window`` tokens (default 512, or the context if that is smaller).

    Raises:
        ValueError: fewer than two tokens, or a window outside 2 … context.
    """
    ids = np.asarray(token_ids)
    window = min(512, engine.info.context) if window is None else window
    if not 2 <= window <= engine.info.context:
        raise ValueError(f"window is {window}; allowed is 2 to the context, {engine.info.context}")
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"there are {ids.size} tokens; at least 2 are needed to predict one")
    started = time.perf_counter()
    nats, tokens, size, windows = 0.0, 0, 0, 0
    starts = [start for start in range(0, len(ids), window) if len(ids) - start >= 2]
    for start in starts:
        part = ids[start : start + window]
        nats += float(np.sum(surprise(engine.logits(part)[:-1], part[1:])))
        tokens += len(part) - 1
        size += sum(byte_count(engine.tokenizer, token_id) for token_id in part[1:].tolist())
        windows += 1
        if progress is not None:
            progress(windows, len(starts))
    return Perplexity(tokens, windows, window, size, nats / tokens, time.perf_counter() - started)


def surprise(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> NDArray[np.float64]:
    """Negative log-probability in nats of ``targets`` [T] under ``logits`` [T, V]: float64 [T]."""
    result = np.empty(len(targets), np.float64)
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        aims = targets[start : start + _ROWS]
        top = rows.max(axis=1)
        log_sum = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
        result[start : start + _ROWS] = log_sum - rows[np.arange(len(rows)), aims]
    return result


def byte_count(tokenizer: Tokenizer, token_id: int) -> int:
    """Bytes of text that a token stands for."""
    return 0 if tokenizer.is_control(token_id) else len(tokenizer.token_bytes(token_id))


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the model or the input is unusable."""
    parser = argparse.ArgumentParser(prog="python -m runtime_cpu.perplexity", description=measure.__doc__)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("input", type=Path, help="UTF-8 text, or token ids in .npy or .ds")
    parser.add_argument("--window", type=int, help="tokens per window (default: 512 or the context)")
    parser.add_argument("--max-tokens", type=int, help="use only so many tokens from the front")
    parser.add_argument("--threads", type=int)
    add_kv_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a sentence")
    options = parser.parse_args(arguments)
    try:
        with Engine.open(options.model, options.threads, kv_type=options.kv, sessions=1) as engine:
            ids = read_tokens(options.input, engine.tokenizer)[: options.max_tokens]
            result = measure(engine, ids, options.window, show_window)
    except (OSError, EngineError, TokenizerError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.json:
        values = {**asdict(result), "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
        sys.stdout.write(json.dumps(values) + "\n")
    else:
        sys.stdout.write(
            f"{result.nats_per_token:.4f} nats per token, perplexity {result.perplexity:.3f}, "
            f"{result.bits_per_byte:.4f} bits per byte ({result.tokens} tokens in {result.windows} windows "
            f"of {result.window_tokens}, {result.duration_s:.1f} s)\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
