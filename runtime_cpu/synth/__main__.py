"""The command ``python -m runtime_cpu.synth 4b OUT.gguf --check``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runtime_cpu.console import show_progress
from runtime_cpu.files.gguf_writer import GGUFWriteError
from runtime_cpu.pack.packing import pack
from runtime_cpu.synth.check import measure, report
from runtime_cpu.synth.routing import TEXT_OVERLAP
from runtime_cpu.synth.shapes import SHAPES, Shape, SynthError
from runtime_cpu.synth.synthesis import write


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 2: an option is unusable or the file cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.synth",
        description="Write a model of random weights with the statistics of a trained one.",
    )
    parser.add_argument("size", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path, help="GGUF file to write")
    parser.add_argument("--layout", choices=("stock", "packed"), default="stock", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="layers, for a smaller file (default: the size's own)")
    parser.add_argument(
        "--overlap",
        type=float,
        default=TEXT_OVERLAP,
        help="share of a layer's experts that consecutive tokens of text have in common (default: %(default)s)",
    )
    parser.add_argument(
        "--head-predictor",
        type=float,
        metavar="SHARE",
        help="add a random predictor of output rows that names about this share of them (default: none)",
    )
    parser.add_argument("--check", action="store_true", help="run the file and print what the engine counts")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.size]
    try:
        if options.layers is not None:
            if not 1 <= options.layers <= 1000:
                raise SynthError(f"--layers is {options.layers}; allowed is 1 to 1000")
            shape = dataclasses.replace(shape, layers=options.layers)
        if options.seed < 0:
            raise SynthError(f"--seed is {options.seed}; allowed is 0 and more")
        started = time.perf_counter()
        _write_layout(
            options.out, shape, options.seed, options.overlap, options.head_predictor, options.layout
        )
        seconds = time.perf_counter() - started
        sys.stdout.write(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB in {seconds:.0f} s\n")
        if options.check:
            sys.stdout.write(report(measure(options.out)))
    except (OSError, SynthError, GGUFWriteError) as error:
        show_progress("")
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _write_layout(
    out: Path, shape: Shape, seed: int, overlap: float, head_share: float | None, layout: str
) -> None:
    if layout == "stock":
        write(out, shape, seed, overlap, head_share, show_progress)
        return
    stock = out.with_name(f".{out.name}.stock")
    try:
        write(stock, shape, seed, overlap, head_share, show_progress)
        pack(stock, out)
    finally:
        stock.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
