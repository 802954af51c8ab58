"""Command-line options that several of the engine's commands share: ``add_kv_option(parser)``."""

from __future__ import annotations

import argparse

from runtime_cpu.planning import KV_TYPES


def add_kv_option(parser: argparse.ArgumentParser) -> None:
    """``--kv``, for ``Engine.open(kv_type=...)``."""
    parser.add_argument(
        "--kv",
        choices=KV_TYPES,
        default="auto",
        help="keys and values: q8 takes half the memory of f16 and rounds to 8 bits (default: %(default)s)",
    )
