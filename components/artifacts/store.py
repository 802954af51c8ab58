"""The artefact store: where artefacts live, whether one is finished, and why one is stale.

Layout: ``<root>/<recipe>/<stage>/<first 12 digits of the fingerprint>/``. A folder without ``manifest.json`` is work in
progress, or what a crash left; the same stage continues there.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts.digests import WAITING_THREADS
from components.artifacts.files import fsync_path, in_parallel, write_atomically
from components.artifacts.manifest import (
    MANIFEST_NAME,
    ArtifactError,
    Manifest,
    ParentEntry,
    read_manifest,
)
from components.artifacts.verification import Check, check_sizes, check_start, check_whole

_SHORT_DIGITS = 12


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one level of dotted names: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; lists stay whole."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, object] = {}
        for key, inner in value.items():
            flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


@dataclass(frozen=True)
class Identity:
    """What makes an artefact what it is.

    Its fingerprint is computed from stage, version, parents and the config without the fields in ``placement``.
    """

    recipe: str
    stage: str
    stage_version: int
    config: Mapping[str, Any]
    parents: Mapping[str, ParentEntry]
    fingerprint: str
    placement: frozenset[str] = frozenset()


class ArtifactStore:
    """Artefacts below one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[Path] = set()

    def folder(self, identity: Identity) -> Path:
        """The folder of an artefact, finished or not."""
        return self.root / identity.recipe / identity.stage / identity.fingerprint[:_SHORT_DIGITS]

    def finished(self, identity: Identity) -> Manifest | None:
        """The manifest when the artefact is finished and every file has its recorded size, else ``None``.

        Raises:
            ArtifactError: the manifest is there, and files are missing or have other sizes.
        """
        folder = self.folder(identity)
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        if manifest.fingerprint != identity.fingerprint:
            raise ArtifactError(f"{folder} holds the fingerprint {manifest.fingerprint[:12]}, not its own")
        if problems := check_sizes(folder, manifest):
            raise self._damaged(identity.stage, folder, problems)
        return manifest

    def verify(self, identity: Identity) -> Check | None:
        """Check the files before a stage reads them, once per process: see ``check_start``.

        Returns:
            What was read of them; ``None`` when this process has checked them before.

        Raises:
            ArtifactError: a file does not match its manifest.
        """
        folder = self.folder(identity)
        if folder in self._verified:
            return None
        check = check_start(folder, self._manifest(identity))
        if check.problems:
            raise self._damaged(identity.stage, folder, check.problems)
        self._verified.add(folder)
        return check

    def verify_whole(self, identity: Identity, advance: Callable[[int], None]) -> None:
        """Read every byte and compare, telling ``advance`` how many were read.

        Raises:
            ArtifactError: a file does not match its manifest.
        """
        folder = self.folder(identity)
        if problems := check_whole(folder, self._manifest(identity), advance):
            raise self._damaged(identity.stage, folder, problems)

    def _manifest(self, identity: Identity) -> Manifest:
        folder = self.folder(identity)
        manifest = read_manifest(folder)
        if manifest is None:
            raise ArtifactError(f"{folder} has no manifest: the stage {identity.stage} has not finished")
        return manifest

    @staticmethod
    def _damaged(stage: str, folder: Path, problems: Sequence[str]) -> ArtifactError:
        return ArtifactError(
            f"the artefact of stage {stage} in {folder} is damaged: {'; '.join(problems[:3])}. "
            f"Nothing was changed. To set it aside and build it again, add --rebuild {stage}"
        )

    def set_aside(self, identity: Identity) -> Path | None:
        """Rename an artefact's folder so that its stage is built again; returns the new name."""
        folder = self.folder(identity)
        if not folder.exists():
            return None
        number = 1
        while (target := folder.with_name(f"{folder.name}.aside-{number}")).exists():
            number += 1
        folder.rename(target)
        self._verified.discard(folder)
        return target

    def why_stale(self, identity: Identity) -> list[str]:
        """Compare with the newest finished artefact of the same stage: one line per field that differs."""
        newest: Manifest | None = None
        parent = self.root / identity.recipe / identity.stage
        folders = sorted(parent.iterdir()) if parent.is_dir() else []
        for folder in folders:
            if not folder.is_dir() or len(folder.name) != _SHORT_DIGITS:
                continue
            manifest = read_manifest(folder)
            if manifest is not None and (newest is None or manifest.created_at > newest.created_at):
                newest = manifest
        if newest is None:
            started = self.folder(identity).exists()
            return ["an earlier attempt did not finish"] if started else ["never built"]
        reasons = []
        if newest.stage_version != identity.stage_version:
            reasons.append(f"stage version {newest.stage_version} -> {identity.stage_version}")
        before, now = flatten(newest.config), flatten(identity.config)
        for name in sorted(before.keys() | now.keys()):
            old, new = before.get(name, "absent"), now.get(name, "absent")
            if old != new and name.partition(".")[0] not in identity.placement:
                reasons.append(f"{identity.stage}.{name}: {_short(old)} -> {_short(new)}")
        for role, entry in identity.parents.items():
            other = newest.parents.get(role)
            if other is None or other.fingerprint != entry.fingerprint:
                reasons.append(f"parent {role} changed")
        return reasons or ["the artefact was removed or set aside"]

    def write_manifest(self, folder: Path, manifest: Manifest) -> None:
        """Finish an artefact: drop scratch, fsync its files, write the manifest last."""
        for path in folder.iterdir():
            if path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for _ in in_parallel(lambda name: fsync_path(folder / name), manifest.files, WAITING_THREADS):
            pass
        write_atomically(folder / MANIFEST_NAME, (manifest.model_dump_json(indent=2) + "\n").encode())

    @contextmanager
    def lock(self, identity: Identity, on_wait: Callable[[], None]) -> Iterator[int]:
        """Hold the artefact's lock while building, calling ``on_wait`` first when another process holds it.

        Yields the lock's file descriptor. The kernel releases an ``flock`` with the last process that holds the
        descriptor, so a killed runner leaves nothing behind, and a stage process that inherits it is waited for.
        """
        folder = self.folder(identity)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle.fileno()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
