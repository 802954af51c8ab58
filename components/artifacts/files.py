"""Files that survive a crash: ``write_json(path, value)`` leaves the old file or the new one, never a torn one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

PROJECT = Path(__file__).resolve().parents[2]
"""The checkout, where processes of the project are started and its files are found."""

_CHUNK_BYTES = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


def canonical_json(value: object) -> str:
    """Serialise ``value`` so that equal values give equal text on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_file(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file's bytes (hex), reading 1 MiB at a time and telling ``advance`` how many were read."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def in_parallel(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """``map`` over threads, for what waits for files or hashes them: results in order, the first error raised.

    Whatever ends it early (an error, Ctrl-C) calls ``stop``, drops what has not begun and waits for what has.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, items)
    finally:
        stop()
        pool.shutdown(wait=True, cancel_futures=True)


def fsync_path(path: Path) -> None:
    """``fsync`` a file, or a folder's entries, so that a power failure does not lose them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file, written piece by piece, that appears under its name only when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    with draft.open("wb") as handle:
        yield handle
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(path)
    fsync_path(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomically(path, text.encode())
