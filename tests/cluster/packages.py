"""Debian's Slurm, unpacked into a cache and never installed: ``python -m tests.cluster.packages`` says where.

``apt-get download`` fetches, ``dpkg -x`` unpacks; nothing of the system changes. The folder is
``SMALLTHINKER_SLURM`` when that is set, else ``~/.cache/smallthinker/slurm``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "munge",
    "libmunge2",
    "libhwloc15",
)
_NEEDED = ("usr/sbin/slurmctld-wlm", "usr/sbin/slurmd-wlm", "usr/sbin/slurmstepd-wlm", "usr/bin/sbatch")


class NoSlurmError(Exception):
    """Slurm cannot be had here; the message says what is missing."""


def place() -> Path:
    """Where the packages are unpacked."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SMALLTHINKER_SLURM") or cache / "smallthinker" / "slurm")


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoSlurmError(f"{' '.join(command[:2])}: {error}") from error
    if done.returncode:
        raise NoSlurmError(f"{' '.join(command[:2])}: {(done.stderr or done.stdout).strip()[-300:]}")


def fetch() -> Path:
    """The folder with the unpacked packages, fetched when they are not there yet.

    Raises:
        NoSlurmError: no apt or dpkg, no such packages, or nowhere to get them from.
    """
    target = place()
    if all((target / name).exists() for name in _NEEDED):
        return target
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise NoSlurmError(f"{tool} is not here: Slurm comes as Debian's packages")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".slurm-") as name:
        folder = Path(name)
        _run(["apt-get", "download", *PACKAGES], folder)
        root = folder / "root"
        root.mkdir()
        for package in sorted(folder.glob("*.deb")):
            _run(["dpkg", "-x", package.name, root.name], folder)
        for program in ("slurmctld", "slurmd", "slurmstepd"):  # what Debian's alternatives would link
            (root / "usr" / "sbin" / program).symlink_to(f"{program}-wlm")
        missing = [needed for needed in _NEEDED if not (root / needed).exists()]
        if missing:
            raise NoSlurmError(f"Debian's packages lack {', '.join(missing)}")
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)
    return target


if __name__ == "__main__":
    try:
        print(fetch())
    except NoSlurmError as error:
        sys.exit(f"error: {error}")
