"""Manifests: what an artefact folder holds, where it came from, and how its identity is computed.

An artefact is a folder whose ``manifest.json`` was written last. No manifest, no artefact.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from components.artifacts.digests import SAMPLED_FROM_BYTES, hashing_threads, sampled_sha256
from components.artifacts.files import canonical_json, in_parallel, sha256_file

MANIFEST_NAME = "manifest.json"


class ArtifactError(Exception):
    """An artefact is missing, torn or does not match its manifest."""


class FileEntry(BaseModel):
    """Size and checksums of one file of an artefact.

    Attributes:
        sha256: of all bytes.
        sampled_sha256: of blocks of it, see :func:`components.artifacts.digests.sampled_sha256`; ``None`` for a small
            file, and in manifests of before it was kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    sha256: str
    sampled_sha256: str | None = None

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Read a file and describe it."""
        size = path.stat().st_size
        sampled = sampled_sha256(path, size) if size >= SAMPLED_FROM_BYTES else None
        return cls(size_bytes=size, sha256=sha256_file(path), sampled_sha256=sampled)


class ParentEntry(BaseModel):
    """A parent artefact by role: which stage made it, and which of its versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    fingerprint: str


class ProcessPeaks(BaseModel):
    """Peak memory of a stage's worker processes as they report it themselves, on whatever machine, in bytes.

    ``host`` is a process's largest resident set, in which pages that processes share count for each; ``device`` is what
    torch allocated on its accelerator, 0 on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int
    host_bytes_greatest: int
    host_bytes_sum: int
    device_bytes_greatest: int
    device_bytes_sum: int


class Manifest(BaseModel):
    """The contents of ``manifest.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    stage: str
    stage_version: int
    recipe: str
    fingerprint: str
    config: dict[str, Any]
    parents: dict[str, ParentEntry]
    files: dict[str, FileEntry]
    metrics: dict[str, float]
    notes: list[str] = []
    code_revision: str
    created_at: str
    duration_s: float
    peak_memory_bytes: int
    process_peaks: ProcessPeaks | None = None


def fingerprint(
    stage: str, stage_version: int, config: Mapping[str, Any], parents: Mapping[str, ParentEntry]
) -> str:
    """Identity of an artefact: SHA-256 over stage, version, declared config and parents (hex, 64 digits)."""
    payload = {
        "stage": stage,
        "stage_version": stage_version,
        "config": config,
        "parents": {role: entry.fingerprint for role, entry in parents.items()},
    }
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Read a folder's manifest; ``None`` when the folder is not a finished artefact.

    Raises:
        ArtifactError: the manifest exists and cannot be understood.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(f"{path} is not a valid manifest: {error}") from error


def collect_files(folder: Path) -> dict[str, FileEntry]:
    """Checksum every file below ``folder`` except its manifest and hidden entries, on all cores."""
    names = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if relative.as_posix() != MANIFEST_NAME:
            names.append(relative.as_posix())
    entries = in_parallel(lambda name: FileEntry.of(folder / name), names, hashing_threads())
    return dict(zip(names, entries, strict=True))


def code_revision(project: Path) -> str:
    """The git revision of the code, with ``+dirty`` when files differ; ``unknown`` outside a checkout."""
    try:
        revision = subprocess.run(
            ["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(project), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision}+dirty" if status else revision
