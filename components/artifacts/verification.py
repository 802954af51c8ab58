"""Whether files are what their manifest says: ``check_start(folder, manifest)`` in seconds, ``check_whole`` in full.

At a start every file has to be there in its size. Read whole are files below 1 MiB, then the smallest ones up to
``EVERY_START_BYTES``, and up to ``FIRST_START_BYTES`` of those of which no whole reading is remembered. The rest, the
large files of large artefacts, is read in samples; :mod:`components.artifacts.digests` says what these find.

What was read whole and matched is remembered beside the artefact, in ``.<folder>.verified.json``, with the file's size,
times and inode: whatever writes to a file, moves another to its place or copies it changes one of them. A bit that rots
on the disk does not; that is what ``check_whole`` is for.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts.digests import SAMPLED_FROM_BYTES, WAITING_THREADS, hashing_threads, sampled_sha256
from components.artifacts.files import in_parallel, sha256_file, write_atomically
from components.artifacts.manifest import FileEntry, Manifest

EVERY_START_BYTES = 4 << 30
FIRST_START_BYTES = 32 << 30


@dataclass(frozen=True)
class Check:
    """What a check at a start found and read.

    Attributes:
        problems: one sentence per damaged file; empty when all is well.
        whole: files that were read whole.
        sampled: files that were read in samples.
        unread: those of ``sampled`` of which no whole reading is remembered either.
    """

    problems: tuple[str, ...]
    whole: tuple[str, ...] = ()
    sampled: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def check_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """One sentence per file that is missing or has another size than the manifest says."""

    def problem(item: tuple[str, FileEntry]) -> str | None:
        name, entry = item
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != entry.size_bytes:
            return f"{name} has {size} bytes, the manifest says {entry.size_bytes}"
        return None

    return [found for found in in_parallel(problem, manifest.files.items(), WAITING_THREADS) if found]


def check_start(folder: Path, manifest: Manifest) -> Check:
    """Compare a folder with its manifest within a minute, whatever it holds; see the module.

    That takes storage of 1 GB/s, or 40 s of it where 36 GiB are read whole.
    """
    if problems := check_sizes(folder, manifest):
        return Check(tuple(problems))
    files = manifest.files
    remembered = _remembered(folder, files)
    whole, sampled = _divide(files, remembered)
    problems = _compare_whole(folder, {name: files[name] for name in whole}, lambda count: None)

    def differs(name: str) -> bool:
        return sampled_sha256(folder / name, files[name].size_bytes) != files[name].sampled_sha256

    answers = in_parallel(differs, sampled, WAITING_THREADS)
    problems += [
        f"{name} does not match its sampled SHA-256"
        for name, wrong in zip(sampled, answers, strict=True)
        if wrong
    ]
    unread = tuple(name for name in sampled if name not in remembered)
    return Check(tuple(problems), tuple(whole), tuple(sampled), unread)


def check_whole(folder: Path, manifest: Manifest, advance: Callable[[int], None]) -> list[str]:
    """Read every byte: one sentence per file that is not what the manifest says, empty when all is well.

    Args:
        folder: the artefact.
        manifest: its manifest.
        advance: told how many bytes were read, from several threads.
    """
    return check_sizes(folder, manifest) or _compare_whole(folder, manifest.files, advance)


def _divide(files: Mapping[str, FileEntry], remembered: Iterable[str]) -> tuple[list[str], list[str]]:
    """Which files are read whole, and which in samples."""
    known = set(remembered)
    whole, sampled = [], []
    every = first = 0
    for name in sorted(files, key=lambda name: (files[name].size_bytes, name)):
        size = files[name].size_bytes
        if size < SAMPLED_FROM_BYTES or every + size <= EVERY_START_BYTES:
            every += size
            whole.append(name)
        elif name not in known and (first + size <= FIRST_START_BYTES or files[name].sampled_sha256 is None):
            first += size
            whole.append(name)
        elif files[name].sampled_sha256 is not None:
            sampled.append(name)
    return whole, sampled


def _compare_whole(folder: Path, files: Mapping[str, FileEntry], advance: Callable[[int], None]) -> list[str]:
    """Hash files and remember those that match; one sentence per file that does not."""
    began_ns = file_system_time_ns(folder)
    stop = threading.Event()

    def progress(count: int) -> None:
        if stop.is_set():
            raise InterruptedError
        advance(count)

    # The largest first, so that none of them is the last to begin.
    names = sorted(files, key=lambda name: -files[name].size_bytes)
    digests = in_parallel(
        lambda name: sha256_file(folder / name, progress), names, hashing_threads(), stop.set
    )
    found = dict(zip(names, digests, strict=True))
    good = {name: entry for name, entry in files.items() if found[name] == entry.sha256}
    remember(folder, good, began_ns)
    return [f"{name} does not match its SHA-256" for name in files if name not in good]


# ---------------------------------------------------------------- what is remembered


def file_system_time_ns(folder: Path) -> int | None:
    """The present by the clock that stamps files beside ``folder``; ``None`` where none can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder.parent) as probe:
            return os.fstat(probe.fileno()).st_ctime_ns
    except OSError:
        return None


def remember(folder: Path, files: Mapping[str, FileEntry], began_ns: int | None) -> None:
    """Note that files were read whole and found to match.

    Args:
        folder: the artefact.
        files: the files' entries.
        began_ns: :func:`file_system_time_ns` before the reading. Files that changed since are not remembered, and
            neither are those that changed in its very tick: who reads could have been earlier.
    """
    if began_ns is None:
        return  # on a read-only file system nothing is remembered, and nothing changes
    before = _read_record(folder)
    record = dict(before)
    for name, entry in files.items():
        state = (folder / name).stat()
        if state.st_ctime_ns < began_ns:
            record[name] = [*_stamp(state), entry.sha256]
    if record != before:
        with suppress(OSError):  # a full disk: the files are read again next time
            write_atomically(_record_path(folder), json.dumps({"files": record}).encode())


def _remembered(folder: Path, files: Mapping[str, FileEntry]) -> set[str]:
    record = _read_record(folder)
    return {
        name
        for name, entry in files.items()
        if record.get(name) == [*_stamp((folder / name).stat()), entry.sha256]
    }


def _stamp(state: os.stat_result) -> list[int]:
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _record_path(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.verified.json"


def _read_record(folder: Path) -> dict[str, Any]:
    """What is remembered; nothing when it cannot be read, since that only costs reading again."""
    try:
        record: dict[str, Any] = dict(json.loads(_record_path(folder).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record
