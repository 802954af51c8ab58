"""What the engine's commands share: an option, and the line on which they show how far they are."""

from __future__ import annotations

import argparse
import sys

from runtime_cpu.engine.options import KV_TYPES


def add_kv_option(parser: argparse.ArgumentParser) -> None:
    """``--kv``, for ``Engine.open(kv_type=...)``."""
    parser.add_argument(
        "--kv",
        choices=KV_TYPES,
        default="auto",
        help="keys and values: q8 takes half the memory of f16 and rounds to 8 bits (default: %(default)s)",
    )


def show_progress(text: str) -> None:
    """Put ``text`` in place of the last one; the empty text clears the line. Only a terminal shows it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def show_window(done: int, total: int) -> None:
    """How many windows of a text are computed; the last one ends the line. Only a terminal shows it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\rwindow {done} of {total}" + ("\n" if done == total else ""))
