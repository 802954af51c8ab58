"""Downloads one pinned package with its ordinary client: ``download(package, folder) -> Download``.

The user's own configuration of pip, npm and apt (mirrors, proxies, certificates) is honoured; no registry is
named here.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.artifacts import sha256_file
from components.sources.catalogue import Package, SourceError, SourceUnavailable

_TIMEOUT_S = 900
_LISTS_AGE_S = 3600


@dataclass(frozen=True)
class Download:
    """A verified archive: where it lies, and what the registry served when that differs from the pin."""

    path: Path
    version: str
    sha256: str
    note: str | None = None


def download(package: Package, folder: Path, cache: Path) -> Download:
    """Download ``package`` into the empty ``folder`` and verify it; apt keeps its lists in ``cache``.

    Raises:
        SourceUnavailable: the client is missing, or the registry cannot be reached or lacks the package.
        SourceError: what was served does not match the pinned SHA-256.
    """
    match package.client:
        case "pip":
            return _pip(package, folder)
        case "npm":
            return _npm(package, folder)
        case "apt":
            return _apt(package, folder, cache / ".apt")


def _pip(package: Package, folder: Path) -> Download:
    own = importlib.util.find_spec("pip") is not None
    pip = [sys.executable, "-m", "pip"] if own else [_client("pip", package)]
    requirement = folder / "requirement.txt"
    # pip verifies the hash itself before it looks inside: an sdist's build code never runs unverified.
    requirement.write_text(f"{package.package}=={package.version} --hash=sha256:{package.sha256}\n")
    only = ["--only-binary", package.package] if package.form == "wheel" else ["--no-binary", package.package]
    retries = [] if "PIP_RETRIES" in os.environ else ["--retries", "1"]
    arguments = [
        "download",
        "--no-deps",
        *only,
        "--require-hashes",
        "-r",
        str(requirement),
        "-d",
        str(folder),
    ]
    result = _call([*pip, *arguments, "--disable-pip-version-check", "--no-input", *retries], folder)
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise _mismatch(package, "what the registry served")
    return _single_archive(
        package, folder, result, ("*.whl",) if package.form == "wheel" else ("*.tar.*", "*.zip")
    )


def _npm(package: Package, folder: Path) -> Download:
    npm = _client("npm", package)
    command = [npm, "pack", f"{package.package}@{package.version}", "--ignore-scripts", "--silent"]
    retries = {} if "npm_config_fetch_retries" in os.environ else {"npm_config_fetch_retries": "1"}
    result = _call([*command, "--pack-destination", str(folder)], folder, retries)
    return _single_archive(package, folder, result, ("*.tgz",))


def _apt(package: Package, folder: Path, state: Path) -> Download:
    apt, _ = _client("apt-get", package), _client("dpkg-deb", package)
    for sub in ("state/lists/partial", "cache/archives/partial"):
        (state / sub).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    # State and cache of our own: no root is needed and the machine's lists stay as they are.
    options = [
        "-q",
        f"-oDir::State={state / 'state'}",
        f"-oDir::State::status={state / 'status'}",
        f"-oDir::Cache={state / 'cache'}",
        "-oAcquire::Languages=none",
        "-oAcquire::Retries=1",
        "-oAPT::Sandbox::User=",
    ]
    archive = folder / "archive"
    archive.mkdir()
    updated = ""
    with (state / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh = state / "updated"
        if not fresh.exists() or time.time() - fresh.stat().st_mtime > _LISTS_AGE_S:
            # The exit status is not looked at: a failing third-party list must not stop the others.
            updated = _call([apt, *options, "update"], folder).stderr
            fresh.touch()
        result = _call([apt, *options, "download", f"{package.package}={package.version}"], archive)
        if result.returncode != 0:
            result = _call([apt, *options, "download", package.package], archive)
    found = sorted(archive.glob("*.deb"))
    if len(found) != 1:
        (state / "updated").unlink(missing_ok=True)
        raise _unreachable(package, updated + result.stderr)
    served = _call(["dpkg-deb", "--field", str(found[0]), "Version"], folder).stdout.strip()
    digest = sha256_file(found[0])
    if digest == package.sha256:
        return Download(found[0], package.version, digest)
    if served == package.version:
        raise _mismatch(package, "the archive apt served under the pinned version")
    note = (
        f"{package.name}: {package.version} is no longer served; used {served}, verified by apt's signature "
        f"(sha256 {digest})"
    )
    return Download(found[0], served, digest, note)


def _single_archive(
    package: Package, folder: Path, result: subprocess.CompletedProcess[str], patterns: Sequence[str]
) -> Download:
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if result.returncode != 0 or len(found) != 1:
        raise _unreachable(package, result.stderr)
    digest = sha256_file(found[0])
    if digest != package.sha256:
        raise _mismatch(package, "what the registry served")
    return Download(found[0], package.version, digest)


def _client(name: str, package: Package) -> str:
    path = shutil.which(name)
    if path is None:
        raise SourceUnavailable(f"{package.name}: its client {name!r} is not installed here")
    return path


def _call(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable(f"{' '.join(command[:3])} did not finish within {_TIMEOUT_S} s") from error


def _mismatch(package: Package, what: str) -> SourceError:
    return SourceError(
        f"{package.name} {package.version}: {what} does not match the pinned SHA-256 {package.sha256[:16]}…; "
        "nothing was unpacked. Check the mirror, or update packages.toml after examining the new archive"
    )


def _unreachable(package: Package, stderr: str) -> SourceUnavailable:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [
        line for line in lines if line.lower().startswith(("error", "e:", "npm err", "npm error"))
    ] or lines
    reason = errors[0][:300] if errors else f"{package.client} gave no reason"
    return SourceUnavailable(
        f"{package.name}: {package.client} could not download {package.package} {package.version} "
        f"({reason}). "
        "The first run needs the package registry; later runs use the cache"
    )
