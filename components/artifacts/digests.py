"""Digests of files too large to read at every start: ``sampled_sha256(path, size)`` reads some 1/4096 of the bytes.

What a sample finds: a file of other contents, a hole or a stretch of zeros or of other data of 128 MiB or more wherever
it lies, any damage in the first or the last 16 KiB, and shorter stretches with a probability of (length + 16 KiB) /
64 MiB. A single flipped bit it finds once in 4,096 times: only the SHA-256 of all bytes is proof.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

SAMPLED_FROM_BYTES = 1 << 20
"""Smaller files are always read whole."""
WAITING_THREADS = 32
"""For what waits for a file system more than it computes."""
_BLOCK_BYTES = 1 << 14
_STRIDE_BYTES = 1 << 26


def hashing_threads() -> int:
    """Threads that keep this machine's cores hashing (hashlib lets go of the interpreter's lock)."""
    return min(WAITING_THREADS, len(os.sched_getaffinity(0)))


def sample_starts(size: int) -> Iterator[int]:
    """Where the sampled blocks of 16 KiB of a file begin: at the front, at the end, and one in every 64 MiB.

    Where within its 64 MiB is drawn by the size, so that blocks do not all fall on the same part of a striped disk.
    """
    yield 0
    dice = random.Random(size)
    for stretch in range(0, size - _BLOCK_BYTES, _STRIDE_BYTES):
        yield stretch + int(dice.random() * (min(_STRIDE_BYTES, size - stretch) - _BLOCK_BYTES))
    yield size - _BLOCK_BYTES


def sampled_sha256(path: Path, size: int) -> str:
    """SHA-256 (hex) of a file's size and of its sampled blocks.

    Args:
        path: the file.
        size: its bytes, :data:`SAMPLED_FROM_BYTES` or more.
    """
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        for start in sample_starts(size):
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
