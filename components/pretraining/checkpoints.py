"""Checkpoints that survive ``kill -9`` and bit rot: ``CheckpointStore(folder, keep=2)``.

A checkpoint is a folder ``step-00000120`` that appears by one rename, after every file in it was checksummed and
flushed to disk. Readers verify the checksums and fall back to the newest checkpoint that is whole.

Layout: ``step-XXXXXXXX/`` holds whatever the trainer wrote (DeepSpeed's files) and ``checksums.json``:
``{"step", "files": {name: {"size_bytes", "sha256"}}, "self": sha256 of the rest}``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import canonical_json, sha256_file, write_atomically

CHECKSUMS_NAME = "checksums.json"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint is torn or altered; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that passed verification."""

    step: int
    path: Path


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / CHECKSUMS_NAME)


def seal(folder: Path, step: int) -> None:
    """Flush every file of ``folder`` to disk and write its checksums."""
    entries: dict[str, Any] = {}
    for path in _files(folder):
        entries[path.relative_to(folder).as_posix()] = {
            "size_bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        _fsync(path)
    payload: dict[str, Any] = {"step": step, "files": entries}
    payload["self"] = hashlib.sha256(canonical_json(payload).encode()).hexdigest()
    write_atomically(folder / CHECKSUMS_NAME, json.dumps(payload, indent=1).encode())
    for directory in [p for p in folder.rglob("*") if p.is_dir()]:
        _fsync(directory)
    _fsync(folder)


def verify(folder: Path) -> int:
    """Check every file of a checkpoint against its checksums; returns the step.

    Raises:
        CheckpointError: a file is missing, surplus, truncated or altered, or the checksums themselves are.
    """
    try:
        payload = json.loads((folder / CHECKSUMS_NAME).read_bytes().decode("utf-8"))
        stated = payload.pop("self")
        files: dict[str, Any] = payload["files"]
        step = int(payload["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder.name}/{CHECKSUMS_NAME} cannot be read") from error
    if hashlib.sha256(canonical_json(payload).encode()).hexdigest() != stated:
        raise CheckpointError(f"{folder.name}/{CHECKSUMS_NAME} was altered")
    present = {path.relative_to(folder).as_posix() for path in _files(folder)}
    if present != set(files):
        names = ", ".join(sorted(present ^ set(files)))
        raise CheckpointError(f"{folder.name} has missing or surplus files: {names}")
    for name, entry in files.items():
        path = folder / name
        if path.stat().st_size != entry["size_bytes"]:
            raise CheckpointError(
                f"{folder.name}/{name} has {path.stat().st_size} bytes instead of {entry['size_bytes']}"
            )
        if sha256_file(path) != entry["sha256"]:
            raise CheckpointError(f"{folder.name}/{name} does not match its SHA-256")
    return step


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they live; created when missing.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, step: int) -> Path:
        """An empty folder to write step ``step``'s files into (one process calls this; others wait for it)."""
        draft = self._draft(step)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        return draft

    def _draft(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    def commit(self, step: int) -> Checkpoint:
        """Seal the prepared folder, make it visible in one rename, and drop what policy no longer keeps."""
        draft, final = self._draft(step), self.folder / f"step-{step:08d}"
        seal(draft, step)
        if final.exists():  # an earlier attempt's, found torn when it was read
            shutil.rmtree(final)
        draft.rename(final)
        _fsync(self.folder)
        for stale in self._steps()[: -self._keep]:
            shutil.rmtree(self.folder / f"step-{stale:08d}")
        return Checkpoint(step, final)

    def _steps(self) -> list[int]:
        matches = [_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(match.group(1)) for match in matches if match)

    def newest(self, at_most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint (not beyond step ``at_most``), and one sentence for every one passed over."""
        complaints: list[str] = []
        for step in reversed(self._steps()):
            if at_most is not None and step > at_most:
                continue
            path = self.folder / f"step-{step:08d}"
            try:
                stated = verify(path)
                if stated != step:
                    raise CheckpointError(f"{path.name} says that it is of step {stated}")
            except CheckpointError as error:
                complaints.append(f"Passed over a damaged checkpoint: {error}.")
                continue
            return Checkpoint(step, path), complaints
        return None, complaints

    def discard_after(self, step: int) -> None:
        """Remove drafts and every checkpoint beyond ``step``: the run goes on from there and rewrites them."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)
        for later in self._steps():
            if later > step:
                shutil.rmtree(self.folder / f"step-{later:08d}")
