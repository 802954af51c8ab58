"""A root of Debian's Python, libstdc++ and what they depend on, without a compiler, in which an installed wheel runs.

``infra/packaging/debian.py`` unpacks it; chroot enters it in namespaces of its own, for which no root is needed where
the kernel grants user namespaces. Another processor's programs run under qemu's user-mode emulation, called by name, so
that the kernel need not know it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}
VENV = "/opt/smallthinker"
# numpy's wheels want the system's libstdc++, which ours do not.
PACKAGES = ("python3", "libstdc++6")
# The kernel's folders as they are; everything is unmounted with the namespace.
ENTER = """
set -e
for folder in dev proc sys; do mount --rbind "/$folder" "$0/$folder"; done
exec chroot "$0" "$@"
"""


class MissingError(Exception):
    """A sentence that names what this machine lacks."""


@dataclass(frozen=True)
class CleanRoot:
    """A root folder and how its programs run."""

    folder: Path
    emulator: tuple[str, ...]

    def run(self, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program of the root with ``text`` as its input."""
        return subprocess.run(
            [
                *("unshare", "--map-root-user", "--mount", "sh", "-c", ENTER, str(self.folder)),
                *self.emulator,
                *command,
            ],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
        )

    def smallthinker(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run the installed command. Under emulation its first line, which names the interpreter, is not followed."""
        interpreter = [f"{VENV}/bin/python"] if self.emulator else []
        return self.run(*interpreter, f"{VENV}/bin/smallthinker", *arguments, text=text)

    def install(self, wheels: Path, pip: Path) -> None:
        """Install the project from a folder of wheels, as ``docs/serving.md`` says; pip chooses the fitting one."""
        shutil.copytree(wheels, self.folder / "wheels")
        for command in (
            ("/usr/bin/python3", "-m", "venv", "--without-pip", VENV),
            (
                *(f"{VENV}/bin/python", f"/wheels/{pip.name}/pip", "install", "--no-index", "--no-compile"),
                *("--find-links", "/wheels", "smallthinker"),
            ),
        ):
            done = self.run(*command)
            assert done.returncode == 0, done.stdout + done.stderr


def unpack(suite: str, machine: str, folder: Path) -> CleanRoot:
    """Make the root for a Debian release and a processor.

    Raises:
        MissingError: no emulator, no namespaces, or the packages cannot be had.
    """
    emulator = None
    if machine != platform.machine():
        names = (f"qemu-{machine}-static", f"qemu-{machine}")
        emulator = next((path for name in names if (path := shutil.which(name))), None)
        if emulator is None:
            raise MissingError(f"there is no {names[0]} (on Debian: apt-get install qemu-user-static)")
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "true"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MissingError(f"this system grants no namespaces: {done.stderr.strip()}")
    done = subprocess.run(
        [sys.executable, PROJECT / "infra/packaging/debian.py", suite, DEBIAN[machine], folder, *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MissingError(done.stderr.strip())
    for name in ("dev", "proc", "sys", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    if emulator is None:
        return CleanRoot(folder, ())
    shutil.copy(emulator, folder / "emulator")
    return CleanRoot(folder, ("/emulator",))
