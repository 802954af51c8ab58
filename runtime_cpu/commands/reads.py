"""What reading experts from the file costs on a text: ``python -m runtime_cpu.reads MODEL TOKENS --experts 10``.

The text is computed token by token, as decoding does, in windows that each begin anew, with room for so many experts of
all layers together; the others are read when a layer asks for them, or ahead of that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime_cpu._core import EngineError
from runtime_cpu.engine.engine import Engine
from runtime_cpu.text.token_files import read_tokens
from runtime_cpu.text.tokenizer import TokenizerError


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the model or the input is unusable."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.reads", description="Print what reading experts costs on a text."
    )
    parser.add_argument("model", type=Path, help="GGUF file with Q4_0 experts")
    parser.add_argument("tokens", type=Path, help="UTF-8 text, or token ids in .npy or .ds")
    parser.add_argument("--experts", type=int, required=True, help="that have room, of all layers together")
    parser.add_argument("--window", type=int, default=256, help="tokens that are computed in one go")
    parser.add_argument("--max-tokens", type=int, help="use only so many tokens from the front")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--no-speculate", action="store_true", help="never read what the next layers will only probably want"
    )
    options = parser.parse_args(arguments)
    try:
        with Engine.open(
            options.model,
            options.threads,
            context=options.window,
            sessions=1,
            chunk_tokens=1,
            speculate=not options.no_speculate,
            experts_in_memory=options.experts,
        ) as engine:
            ids = read_tokens(options.tokens, engine.tokenizer)[: options.max_tokens]
            result = _measure(
                engine, [ids[at : at + options.window] for at in range(0, len(ids), options.window)]
            )
    except (OSError, EngineError, TokenizerError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


def _measure(engine: Engine, windows: Sequence[NDArray[np.integer]]) -> dict[str, float]:
    """Counts over all windows, and figures per token."""
    read_bytes = missing = found = 0
    wait_s = compute_s = 0.0
    for window in windows:
        engine.logits(window)
        used = engine.stats
        read_bytes += used.bytes_read
        missing += used.cache_misses
        found += used.cache_hits
        wait_s += used.io_wait_s
        compute_s += used.prompt_s
    tokens = sum(map(len, windows))
    return {
        "tokens": tokens,
        "experts": engine.info.plan.experts,
        "experts_in_memory": engine.info.plan.experts_in_memory,
        "router_lead": engine.info.router_lead,
        "bytes_per_token": read_bytes / tokens,
        # Neither in memory nor on their way when their layer asked.
        "missing_experts_per_token": missing / tokens,
        "found_share": found / max(1, found + missing),
        "wait_s_per_token": wait_s / tokens,  # of all threads together
        "s_per_token": compute_s / tokens,
    }


if __name__ == "__main__":
    sys.exit(main())
