"""Wheels of the engine for x86_64 and aarch64, for CPython 3.11 and for 3.12 and later, in ``dist/``: ``make wheels``.

Python's part of the wheel comes from scikit-build-core, once. The compiled module is built for each processor and
Python with GCC and with headers from Debian, so nothing of the target has to run here. auditwheel reads from the module
which glibc it asks for and names the wheel by it; abi3audit checks that the stable one keeps to 3.12's limited API.

GCC and not zig, which needs no cross compiler: zig's runtime (0.17.1) says of every x86_64 processor that it has
neither AVX2 nor AVX-512, and the engine falls back to its reference kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from debian import DebianError, fetch

PROJECT = Path(__file__).resolve().parents[2]
BUILD = PROJECT / "build/wheels"
DIST = PROJECT / "dist"
# The oldest glibc that a wheel may ask for: that of RHEL 9, older than those of Ubuntu 22.04 and Debian 12.
NEWEST_GLIBC = (2, 34)


class WheelError(Exception):
    """A sentence that says why a wheel cannot be built."""


@dataclass(frozen=True)
class Machine:
    """A processor, and what Debian calls it."""

    name: str
    debian: str


@dataclass(frozen=True)
class Python:
    """Headers that a module is compiled with, and the tag of what it then serves."""

    version: str
    tag: str
    suite: str
    headers_sha256: dict[str, str]


MACHINES = (Machine("x86_64", "amd64"), Machine("aarch64", "arm64"))
# Headers are pinned by what is in them: a release's later package of them is taken as long as they are the same.
PYTHONS = (
    Python(
        "3.11",
        "cp311-cp311",
        "bookworm",
        {
            "x86_64": "cb600a64cc44d5459fb168e1c3e06deffcb82b6a7bb04f7face81507c2e2eeb2",
            "aarch64": "70f614847f2de6c68f941cbab0fcef2a927092679a8bba26e820ad8d917c9c63",
        },
    ),
    Python(
        "3.13",
        "cp312-abi3",
        "trixie",
        {
            "x86_64": "fb2f3f89dfbe147c59c826b826eef88ab15a2b92828fa34de69b639e3c2b7da4",
            "aarch64": "3caa10a3443c82d9240b4bf0c8f2fb43ef63d32583cb9a52b69b72124efdf054",
        },
    ),
)


def run(command: Sequence[str | Path], doing: str, **options: str | Path) -> None:
    """Run a command whose output matters only when it fails."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise WheelError(f"{doing} failed:\n{done.stdout[-4000:]}")


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files below ``folder``."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def headers(python: Python, machine: Machine) -> Path:
    """The ``include`` folder with a Python's headers for a machine, fetched when it is not there yet.

    Raises:
        WheelError: they cannot be had, or are not those that were pinned.
    """
    root = BUILD / f"headers-{python.version}-{machine.name}"
    include = root / "usr/include"
    if not include.exists():
        try:
            fetch(python.suite, machine.debian, root, [f"libpython{python.version}-dev"], closure=False)
        except DebianError as error:
            raise WheelError(f"the headers of Python {python.version} are missing: {error}") from error
    found = digest(include)
    if found != python.headers_sha256[machine.name]:
        shutil.rmtree(root)
        raise WheelError(
            f"the headers of Python {python.version} for {machine.name} in Debian {python.suite} are not the pinned "
            f"ones: SHA-256 {found}; look at what changed and pin them in infra/packaging/wheels.py"
        )
    return include


def compiler(machine: Machine) -> str:
    """The C++ compiler for a machine.

    Raises:
        WheelError: there is none.
    """
    name = f"{machine.name}-linux-gnu-g++"
    found = shutil.which(name)
    if found is None:
        package = f"g++-{machine.name.replace('_', '-')}-linux-gnu"
        raise WheelError(f"there is no {name} (on Debian: apt-get install {package})")
    return found


def compiled(python: Python, machine: Machine) -> Path:
    """The engine's module for a Python and a machine; objects that know no Python are compiled once per machine."""
    include = headers(python, machine)
    folder = BUILD / machine.name
    version = python.version.replace(".", "")
    module = folder / (
        "_core.abi3.so" if "abi3" in python.tag else f"_core.cpython-{version}-{machine.name}-linux-gnu.so"
    )
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine.name,
        "CMAKE_CXX_COMPILER": compiler(machine),
        # An edge box may have an older libstdc++. What of it nothing calls is left out, as are the calls to
        # the newest glibc in it; for that its symbols may not be exported.
        "CMAKE_MODULE_LINKER_FLAGS": "-static-libstdc++ -Wl,--exclude-libs,ALL -Wl,--gc-sections",
        "Python_EXECUTABLE": sys.executable,
        "SMALLTHINKER_PYTHON": python.version,
        "SMALLTHINKER_PYTHON_INCLUDE": f"{include / f'python{python.version}'};{include}",
        "SKBUILD_SOABI": f"cpython-{version}-{machine.name}-linux-gnu",
        "SKBUILD_SOSABI": "abi3",
    }
    doing = f"compiling for CPython {python.version} on {machine.name}"
    run(
        ["cmake", "-G", "Ninja", "-S", PROJECT, "-B", folder, *(f"-D{k}={v}" for k, v in settings.items())],
        doing,
    )
    module.unlink(missing_ok=True)
    run(["cmake", "--build", folder, "--target", "_core", "--parallel", "2"], doing)
    if not module.exists():
        raise WheelError(f"{doing} gave no {module.name}")
    return module


def python_part() -> Path:
    """An unpacked wheel without the compiled module."""
    folder = BUILD / "python"
    shutil.rmtree(folder, ignore_errors=True)
    run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--config-settings=wheel.cmake=false", "--wheel-dir", folder, PROJECT),
        ],
        "building the wheel's Python part",
    )
    (wheel,) = folder.glob("*.whl")
    run([sys.executable, "-m", "wheel", "unpack", "--dest", folder, wheel], "unpacking the wheel")
    return next(path for path in folder.iterdir() if path.is_dir())


def assemble(unpacked: Path, python: Python, machine: Machine, module: Path) -> Path:
    """Put the module into a copy of the unpacked wheel, pack it and let auditwheel name it; gives its path."""
    work = BUILD / f"wheel-{python.tag}-{machine.name}"
    shutil.rmtree(work, ignore_errors=True)
    content = work / unpacked.name
    shutil.copytree(unpacked, content)
    shutil.copy(module, content / "runtime_cpu")
    (facts,) = content.glob("*.dist-info/WHEEL")
    lines = [
        line
        for line in facts.read_text().splitlines()
        if line and not line.startswith(("Tag:", "Root-Is-Purelib:"))
    ]
    facts.write_text(
        "\n".join([*lines, "Root-Is-Purelib: false", f"Tag: {python.tag}-linux_{machine.name}", ""])
    )
    run([sys.executable, "-m", "wheel", "pack", "--dest-dir", work, content], "packing the wheel")
    (packed,) = work.glob("*.whl")
    repaired = work / "repaired"
    run(
        [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, packed],
        f"auditwheel on {packed.name}",
    )
    (wheel,) = repaired.glob("*.whl")
    check(wheel)
    return Path(shutil.copy(wheel, DIST))


def check(wheel: Path) -> None:
    """Refuse a wheel that asks for too new a glibc, or that uses more than its Python's stable ABI.

    Raises:
        WheelError: says which.
    """
    floors = [(int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)]
    if not floors or min(floors) > NEWEST_GLIBC:
        raise WheelError(
            f"{wheel.name} asks for a newer glibc than {'.'.join(map(str, NEWEST_GLIBC))}; build on Debian 12, or with "
            "compilers as old as its own"
        )
    if "abi3" in wheel.name:
        run([sys.executable, "-m", "abi3audit", "--strict", wheel], f"abi3audit on {wheel.name}")


def build(machines: Sequence[Machine]) -> list[Path]:
    """Build all wheels of ``machines`` into ``dist/``, emptied of older wheels of theirs."""
    DIST.mkdir(exist_ok=True)
    for machine in machines:
        compiler(machine)  # what is missing is said before minutes of compiling
        for old in DIST.glob(f"smallthinker-*_{machine.name}.whl"):
            old.unlink()
    unpacked = python_part()
    return [
        assemble(unpacked, python, machine, compiled(python, machine))
        for machine in machines
        for python in PYTHONS
    ]


def main() -> int:
    """The command. Exit code 1: a wheel cannot be built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [machine.name for machine in MACHINES]
    parser.add_argument("--machine", choices=names, action="append", help="default: all")
    chosen = parser.parse_args().machine or names
    try:
        for wheel in build([machine for machine in MACHINES if machine.name in chosen]):
            sys.stdout.write(f"{wheel.relative_to(PROJECT)}  {wheel.stat().st_size:,} bytes\n")
    except WheelError as error:
        sys.stderr.write(f"wheels: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
