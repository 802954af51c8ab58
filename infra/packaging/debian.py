"""Debian packages unpacked into a folder, for another release and another processor than this machine's.

    python infra/packaging/debian.py trixie arm64 FOLDER --only libpython3.13-dev      these packages, as they are
    python infra/packaging/debian.py trixie arm64 FOLDER python3                       with all that they depend on

apt does the work, with state of its own below FOLDER.apt, so that neither this system's package lists nor its packages
change; signatures are checked as usual. The mirror is that of this system, or of the variable DEBIAN_MIRROR. No root is
needed. Packages are unpacked and not set up: their maintainer scripts do not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Since Debian 12 these are links into /usr; packages still name files below both.
MERGED = ("bin", "lib", "lib64", "sbin")


class DebianError(Exception):
    """A sentence that says why packages cannot be had."""


def mirror() -> str:
    """Address of the Debian mirror that this system, or the variable DEBIAN_MIRROR, names."""
    if named := os.environ.get("DEBIAN_MIRROR"):
        return named
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DebianError(
                f"there is no {tool}; Debian's packages are unpacked with it (use Debian or Ubuntu)"
            )
    if not KEYRING.exists():
        raise DebianError("Debian's keys are missing; install the package debian-archive-keyring")
    targets = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(SITE) $(REPO_URI)",
            "Created-By: Packages",
            "Label: Debian",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line.split()[-1] for line in targets.stdout.splitlines() if line.strip()]
    if not found:
        raise DebianError(
            "this system's apt knows no Debian mirror; run apt-get update, or set DEBIAN_MIRROR"
        )
    return found[0]


def fetch(suite: str, architecture: str, folder: Path, packages: list[str], *, closure: bool) -> None:
    """Unpack ``packages`` of a release into ``folder``, with ``closure`` all that they depend on too.

    Raises:
        DebianError: the mirror cannot be reached or has no such packages.
    """
    state = folder.with_name(folder.name + ".apt")
    lists, cache = state / "lists", state / "cache"
    shutil.rmtree(cache, ignore_errors=True)  # a release's former versions would be unpacked too
    for made in (lists / "partial", cache / "archives/partial"):
        made.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",
        "Dir::Cache": cache,
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": state,
        "Dir::State::lists": lists,
        "Dir::State::status": state / "status",
    }
    apt = ["apt-get", "-q", "-y", *(f"-o{name}={value}" for name, value in settings.items())]
    archives = cache / "archives"
    wanted = ["install", "--download-only", *packages] if closure else ["download", *packages]
    for arguments in (["update", "--error-on=any"], wanted):
        done = subprocess.run([*apt, *arguments], cwd=archives, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = " ".join(done.stderr.split())[-400:]
            raise DebianError(
                f"{', '.join(packages)} of Debian {suite} for {architecture} cannot be had: {tail}"
            )
    if folder.exists():
        shutil.rmtree(folder)
    for name in MERGED:
        (folder / "usr" / name).mkdir(parents=True)
        (folder / name).symlink_to(f"usr/{name}")
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True)


def main() -> int:
    """The command. Exit code 2: the packages cannot be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suite", help="Debian release, such as trixie")
    parser.add_argument("architecture", help="Debian's name of the processor, such as arm64")
    parser.add_argument("folder", type=Path, help="emptied and filled")
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--only", action="store_true", help="without what the packages depend on")
    options = parser.parse_args()
    folder = options.folder.absolute()
    try:
        fetch(options.suite, options.architecture, folder, options.packages, closure=not options.only)
    except DebianError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
