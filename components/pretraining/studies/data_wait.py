"""Measures what a storage's reads cost a training step: ``python -m components.pretraining.studies.data_wait TOKENS``.

TOKENS is the artefact of stage ``tokenize``. The batches of the preset's first steps are read, as the first rank of
``--world`` reads them, while this process computes (products of matrices) for ``--compute-ms`` a step; once read ahead,
as the trainer does, and once when they are needed. ``--delay-ms`` holds every row back, to stand for a slower storage.
stdout: one line of JSON each, with the share of the time that was spent waiting.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from components.artifacts import EXIT_USER_ERROR, StageError
from components.corpus.shards import TRAIN_SPLIT, TokenShards
from components.pretraining.data.batches import BatchSource, TokenStream
from components.pretraining.data.prefetch import Groups, Prefetcher
from components.pretraining.presets import PRESETS


class DelayedTokens:
    """Tokens that come some time after they were asked for."""

    def __init__(self, stream: TokenStream, delay_s: float) -> None:
        self._stream, self._delay_s = stream, delay_s

    def __len__(self) -> int:
        return len(self._stream)

    def read(self, start: int, count: int) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        """Tokens ``[start, start + count)``."""
        time.sleep(self._delay_s)
        return self._stream.read(start, count)


def compute(duration_s: float) -> None:
    """Keep a core busy for so long."""
    until, matrix = time.perf_counter() + duration_s, torch.ones(256, 256)
    while time.perf_counter() < until:
        matrix @ matrix


def measure_wait(take: Callable[[int], Groups], steps: int, compute_s: float) -> dict[str, float]:
    """Take and compute steps 1 to ``steps``; step 0, which nothing can be read ahead of, is not counted.

    Returns:
        ``waited_s`` and ``total_s`` of all steps, and ``wait_share``.
    """
    take(0)
    compute(compute_s)
    began, waited_s = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        asked = time.perf_counter()
        take(step)
        waited_s += time.perf_counter() - asked
        compute(compute_s)
    total_s = time.perf_counter() - began
    return {"waited_s": waited_s, "total_s": total_s, "wait_share": waited_s / total_s}


def compare(
    preset: str, streams: Mapping[str, TokenStream], eos_id: int, world: int, steps: int, compute_s: float
) -> dict[str, dict[str, float]]:
    """:func:`measure_wait` for batches that are read ``ahead`` and ``when needed``.

    Raises:
        StageError: the shards hold nothing that the preset wants, or ``world`` processes cannot share its batch.
    """
    config = PRESETS[preset]().model_copy(update={"absent_category": "renormalise"})
    source = BatchSource(config, streams, eos_id)
    batches = Prefetcher(
        lambda step, readers: source.rank_groups(step, 0, world, readers), steps + 1, torch.device("cpu")
    )
    try:
        ahead = measure_wait(batches.take, steps, compute_s)
    finally:
        batches.close()
    needed = measure_wait(lambda step: source.rank_groups(step, 0, world), steps, compute_s)
    return {"ahead": ahead, "when needed": needed}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurement; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", type=Path, help="folder of the tokenize artefact")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="nano")
    parser.add_argument(
        "--world", type=int, default=1, help="processes that share a step; this reads as the first"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compute-ms", type=float, default=500.0, help="computing between two batches")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="held back before every row is read")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        shards = TokenShards.open(options.tokens)
        streams = {
            name: DelayedTokens(shards.shard(TRAIN_SPLIT, name), options.delay_ms / 1e3)
            for name in shards.categories(TRAIN_SPLIT)
        }
        found = compare(
            options.preset, streams, shards.eos_id, options.world, options.steps, options.compute_ms / 1e3
        )
    except StageError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USER_ERROR
    for name, figures in found.items():
        sys.stdout.write(json.dumps({"read": name, **figures}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
