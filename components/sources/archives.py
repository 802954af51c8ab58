"""Unpacks chosen members of a wheel, sdist, npm tarball or Debian package: ``unpack(archive, "apt", …)``."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from components.sources.catalogue import SourceError

_CHUNK_BYTES = 1 << 20


def unpack(archive: Path, folder: Path, members: Sequence[str], strip: int = 0) -> dict[str, tuple[int, str]]:
    """Write the members that match into ``folder``; only regular files, never outside of it.

    Args:
        archive: ``.whl``/``.zip``, ``.tar.*``/``.tgz`` or ``.deb``.
        members: glob patterns (``*`` also matches ``/``) over the names without their first ``strip``
            components.

    Returns:
        Size in bytes and SHA-256 of every file written, by name.

    Raises:
        SourceError: the archive is damaged, a name is unsafe, or a pattern matches nothing.
    """
    written: dict[str, tuple[int, str]] = {}
    unused = set(members)
    try:
        for name, stream in _entries(archive):
            inner = _safe_name(name, strip)
            if inner is None:
                continue
            matching = {pattern for pattern in members if fnmatch.fnmatchcase(inner, pattern)}
            if not matching:
                continue
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                raise SourceError(f"{archive.name} holds the unsafe member name {name!r}; nothing was used")
            unused -= matching
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            digest, size = hashlib.sha256(), 0
            with target.open("wb") as handle:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    handle.write(chunk)
            written[inner] = (size, digest.hexdigest())
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise SourceError(f"{archive.name} is damaged: {error}") from error
    if unused:
        raise SourceError(f"{archive.name} has no member {', '.join(sorted(unused))}; correct packages.toml")
    return dict(sorted(written.items()))


def _safe_name(name: str, strip: int) -> str | None:
    parts = [part for part in PurePosixPath(name.removeprefix("./")).parts if part != "."]
    return "/".join(parts[strip:]) if len(parts) > strip else None


def _entries(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                unix_type = (info.external_attr >> 16) & 0o170000
                if not info.is_dir() and unix_type in (0, 0o100000):
                    with bundle.open(info) as stream:
                        yield info.filename, stream
        return
    with _tar_file(archive) as path, tarfile.open(path) as bundle:
        for member in bundle:
            content = bundle.extractfile(member) if member.isreg() else None
            if content is not None:
                yield member.name, content


@contextmanager
def _tar_file(archive: Path) -> Iterator[Path]:
    if archive.suffix != ".deb":
        yield archive
        return
    if shutil.which("dpkg-deb") is None:
        raise SourceError(f"{archive.name} cannot be unpacked: dpkg-deb is not installed here")
    with tempfile.NamedTemporaryFile(dir=archive.parent, prefix=".", suffix=".tar") as handle:
        result = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(archive)],
            stdout=handle,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise SourceError(f"{archive.name} is damaged: {result.stderr.strip()[:200]}")
        yield Path(handle.name)
