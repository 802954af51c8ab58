"""The command ``python -m runtime_cpu.pack SRC OUT``.

``SRC`` is a stock GGUF file, or an official Hugging Face folder, whose weights are quantised first
(``files/huggingface.py``). ``--layout stock`` stops before packing: a plain GGUF file for this and other engines.
``--stats`` is JSON with ``expert_counts``, as ``pack`` takes them. ``--head-predictor model_lm_head.pt`` adds the
authors' predictor of output rows (``files/head_import.py``).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from runtime_cpu._core import EngineError
from runtime_cpu.console import show_progress
from runtime_cpu.engine.options import MAX_THREADS
from runtime_cpu.files.checkpoint_files import CheckpointError
from runtime_cpu.files.gguf_writer import GGUFWriteError
from runtime_cpu.files.head_import import DEFAULT_THRESHOLD, ImportedPredictor
from runtime_cpu.files.head_import import FILE_NAME as PREDICTOR_NAME
from runtime_cpu.files.huggingface import WEIGHT_TYPES
from runtime_cpu.memory.plan import format_bytes
from runtime_cpu.pack.folder import LAYOUTS, pack_folder
from runtime_cpu.pack.packing import STOCK_HAS_NO_ORDER, PackError, add_predictor, pack


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the source or the statistics are unusable, or the target cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.pack",
        description="Packing a model into the engine's own layout: ``python -m runtime_cpu.pack SRC OUT``.",
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="stock GGUF file with Q4_0 experts, or a Hugging Face folder"
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="where the file goes")
    parser.add_argument(
        "--type", choices=sorted(WEIGHT_TYPES), help="type of a folder's matrices (default: q4_0)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="packed", help="default: %(default)s")
    parser.add_argument("--stats", type=Path, help="JSON with expert_counts [layers][experts]")
    parser.add_argument("--threads", type=int, help="default: all allowed cores")
    parser.add_argument(
        "--head-predictor",
        type=Path,
        metavar="PT",
        help=f"add the authors' predictor of output rows ({PREDICTOR_NAME}), for engines that are asked to use it; "
        "a GGUF file then keeps its layout with --layout stock",
    )
    parser.add_argument(
        "--head-threshold",
        type=float,
        help=f"rows with a greater score are computed (default: {DEFAULT_THRESHOLD:g})",
    )
    options = parser.parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with ExitStack() as stack:
            summary = _run(options, _predictor(options, stack))
    except (OSError, EngineError, PackError, CheckpointError, GGUFWriteError) as error:
        show_progress("")
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        show_progress("")
        sys.stderr.write("error: interrupted; nothing was written\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.stdout.write(summary)
    return 0


def _predictor(options: argparse.Namespace, stack: ExitStack) -> ImportedPredictor | None:
    if options.head_predictor is None:
        if options.head_threshold is not None:
            raise PackError("--head-threshold belongs to --head-predictor, which is missing")
        return None
    threshold = DEFAULT_THRESHOLD if options.head_threshold is None else options.head_threshold
    return stack.enter_context(ImportedPredictor(options.head_predictor, threshold))


def _run(options: argparse.Namespace, predictor: ImportedPredictor | None) -> str:
    counts = None
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise PackError(f"--threads is {options.threads}; allowed is 1 to {MAX_THREADS}")
    if options.stats is not None:
        try:
            counts = json.loads(options.stats.read_text())["expert_counts"]
        except (ValueError, KeyError, TypeError) as error:
            raise PackError(f"{options.stats} holds no expert_counts: {error!r}") from error
    if not options.source.is_dir():
        stock = options.layout == "stock"
        if options.type is not None or (stock and predictor is None):
            raise PackError(
                "--type and --layout stock are for Hugging Face folders; a GGUF file keeps its types"
            )
        if stock and counts is not None:
            raise PackError(STOCK_HAS_NO_ORDER)
        if stock and predictor is not None:
            add_predictor(options.source, options.target, predictor)
        else:
            pack(options.source, options.target, counts, options.threads, predictor)
        return f"{options.target}: {format_bytes(options.target.stat().st_size)}\n"

    started = time.perf_counter()
    converted_s, read_bytes = 0.0, 0

    def advance(done: int, whole: int) -> None:
        nonlocal converted_s, read_bytes
        converted_s, read_bytes = time.perf_counter() - started, done
        note = f"{format_bytes(done)} of {format_bytes(whole)} converted" if done < whole else "packing"
        show_progress(f"{note}, {done / 1e6 / converted_s:.0f} MB/s")

    warnings = pack_folder(
        options.source,
        options.target,
        options.type or "q4_0",
        options.layout,
        counts,
        options.threads,
        advance,
        predictor,
    )
    show_progress("")
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")
    return (
        f"{options.target}: {format_bytes(options.target.stat().st_size)} in {time.perf_counter() - started:.0f} s; "
        f"{format_bytes(read_bytes)} converted at {read_bytes / 1e6 / max(converted_s, 1e-9):.0f} MB/s\n"
    )


def _end(number: int, _: object) -> NoReturn:
    """Leave by way of the clean-up, which a plain SIGTERM would skip."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
