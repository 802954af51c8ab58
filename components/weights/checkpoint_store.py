"""Checkpoints that survive ``kill -9`` and bit rot: ``CheckpointStore(folder, keep=2)``.

A checkpoint is a folder ``step-00000120`` that appears by one rename, after every file in it was checksummed and
fsynced. Readers verify the checksums and fall back to the newest checkpoint that is whole. Checksumming and verifying
can be split over ranks: see ``components.pretraining.checkpoints.saving``.

Layout: ``step-XXXXXXXX/`` holds whatever the trainer wrote (DeepSpeed's files) and ``checksums.json``: ``{"step",
"mesh", "files": {name: {"size_bytes", "sha256"}}, "self": sha256 of the rest}``. ``mesh`` says how the
ranks partitioned it. Hidden folders are drafts; a reader does not see them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.artifacts import canonical_json, fsync_path, sha256_file, write_atomically

CHECKSUMS_NAME = "checksums.json"
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpointError(Exception):
    """A checkpoint is torn or altered; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that passed verification.

    Attributes:
        step: optimizer steps taken before it.
        path: its folder.
        mesh: how the ranks that wrote it partitioned the state.
    """

    step: int
    path: Path
    mesh: Mapping[str, Any] = field(default_factory=dict)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / CHECKSUMS_NAME)


def checksum(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Fsync files of ``folder``; returns their entries of ``checksums.json``."""
    entries: dict[str, Any] = {}
    for name in names:
        path = folder / name
        fsync_path(path)
        entries[name] = {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return entries


def seal(folder: Path, step: int, mesh: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Write the checksums of ``folder``: ``entries``, and those of files that ``entries`` lacks."""
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    missing = sorted(set(entries) - set(names))
    if missing:
        raise DamagedCheckpointError(
            f"{folder.name} has lost files while it was written: {', '.join(missing)}"
        )
    rest = checksum(folder, [name for name in names if name not in entries])
    files = {name: {**entries, **rest}[name] for name in names}
    payload: dict[str, Any] = {"step": step, "mesh": dict(mesh), "files": files}
    payload["self"] = hashlib.sha256(canonical_json(payload).encode()).hexdigest()
    write_atomically(folder / CHECKSUMS_NAME, json.dumps(payload, indent=1).encode())
    for directory in [p for p in folder.rglob("*") if p.is_dir()]:
        fsync_path(directory)
    fsync_path(folder)


def split_by_size(sizes: Mapping[str, int], shares: int) -> list[list[str]]:
    """Split files into ``shares`` lists of about equal bytes; the same on every machine."""
    shares_of_files: list[list[str]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        shares_of_files[lightest].append(name)
        loads[lightest] += sizes[name]
    return shares_of_files


def verify(folder: Path, share: int = 0, shares: int = 1) -> tuple[int, dict[str, Any]]:
    """Check a checkpoint against its checksums; all of it, or one of ``shares`` equal parts of its files.

    Returns:
        Its step, and the mesh that wrote it.

    Raises:
        DamagedCheckpointError: a file is missing, surplus, truncated or altered, or the checksums themselves are.
    """
    try:
        payload = json.loads((folder / CHECKSUMS_NAME).read_bytes().decode("utf-8"))
        stated = payload.pop("self")
        files: dict[str, Any] = payload["files"]
        step, mesh = int(payload["step"]), dict(payload["mesh"])
        sizes = {name: int(entry["size_bytes"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder.name}/{CHECKSUMS_NAME} cannot be read") from error
    if hashlib.sha256(canonical_json(payload).encode()).hexdigest() != stated:
        raise DamagedCheckpointError(f"{folder.name}/{CHECKSUMS_NAME} was altered")
    present = {path.relative_to(folder).as_posix() for path in _files(folder)}
    if present != set(files):
        names = ", ".join(sorted(present ^ set(files)))
        raise DamagedCheckpointError(f"{folder.name} has missing or surplus files: {names}")
    for name, size in sizes.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise DamagedCheckpointError(f"{folder.name}/{name} has {found} bytes instead of {size}")
    for name in split_by_size(sizes, shares)[share]:
        if sha256_file(folder / name) != files[name]["sha256"]:
            raise DamagedCheckpointError(f"{folder.name}/{name} does not match its SHA-256")
    return step, mesh


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
        """An empty folder to write step ``step``'s files into (one rank calls this, the others wait)."""
        draft = self._draft(step)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        return draft

    def _draft(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def commit(
        self, step: int, mesh: Mapping[str, Any] | None = None, entries: Mapping[str, Any] | None = None
    ) -> Checkpoint:
        """Seal the prepared folder, make it visible in one rename, and drop what policy no longer keeps.

        Args:
            step: the step.
            mesh: how the ranks that wrote it partition the state.
            entries: checksums of files that were fsynced and checksummed already.
        """
        draft, final = self._draft(step), self.path(step)
        seal(draft, step, mesh or {}, entries or {})
        if final.exists():  # an earlier attempt's, found torn when it was read
            shutil.rmtree(final)
        draft.rename(final)
        fsync_path(self.folder)
        for stale in self.steps()[: -self._keep]:
            self._remove(stale)
        return Checkpoint(step, final, mesh or {})

    def universal_path(self, step: int) -> Path:
        """Where the resharded form of a step's checkpoint is, or would be."""
        return self.folder / f"step-{step:08d}-universal"

    def _remove(self, step: int) -> None:
        shutil.rmtree(self.universal_path(step), ignore_errors=True)
        shutil.rmtree(self.path(step))

    def steps(self) -> list[int]:
        """Steps of the visible checkpoints, whole or not, ascending."""
        matches = [_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(match.group(1)) for match in matches if match)

    def verify(self, step: int, share: int = 0, shares: int = 1) -> Checkpoint:
        """The checkpoint of ``step``, or one of ``shares`` parts of it, checked.

        Raises:
            DamagedCheckpointError: it is not whole.
        """
        path = self.path(step)
        stated, mesh = verify(path, share, shares)
        if stated != step:
            raise DamagedCheckpointError(f"{path.name} says that it is of step {stated}")
        return Checkpoint(step, path, mesh)

    def newest(self, at_most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint (not beyond step ``at_most``), and one sentence for every one passed over."""
        complaints: list[str] = []
        for step in reversed(self.steps()):
            if at_most is not None and step > at_most:
                continue
            try:
                return self.verify(step), complaints
            except DamagedCheckpointError as error:
                complaints.append(complaint(error))
        return None, complaints

    def discard_after(self, step: int) -> None:
        """Remove drafts and every checkpoint beyond ``step``: the run resumes there and rewrites them."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)
        for later in self.steps():
            if later > step:
                self._remove(later)


def complaint(error: DamagedCheckpointError | OSError) -> str:
    """The sentence for the manifest's notes."""
    return f"Passed over a damaged checkpoint: {error}."
