"""Logits of given tokens as a file: ``python -m runtime_cpu.logits MODEL TOKENS OUT.npy`` (float32 [T, V])."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from runtime_cpu._core import EngineError
from runtime_cpu.engine.engine import Engine
from runtime_cpu.text.token_files import read_tokens
from runtime_cpu.text.tokenizer import TokenizerError


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the model or the input is unusable."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.logits", description="Write logits after each token."
    )
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("tokens", type=Path, help="UTF-8 text, or token ids in .npy or .ds")
    parser.add_argument("out", type=Path, help=".npy file to write")
    parser.add_argument("--max-tokens", type=int, help="use only so many tokens from the front")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    try:
        with Engine.open(options.model, options.threads, sessions=1) as engine:
            rows = engine.logits(read_tokens(options.tokens, engine.tokenizer)[: options.max_tokens])
        with options.out.open("wb") as handle:
            np.save(handle, rows)
    except (OSError, EngineError, TokenizerError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
