"""The wheels of ``make wheels`` installed where there is no compiler, and run there: ``make check-wheels``."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime_cpu import Engine, __version__
from tests.packaging.clean_root import PROJECT, VENV, CleanRoot, MissingError, unpack

pytestmark = pytest.mark.wheels

DIST = PROJECT / "dist"
GOLDEN = PROJECT / "tests/golden/gguf"
MODEL = "tiny-4b-q4_0"
# Debian 12 has CPython 3.11 and Debian 13 has 3.13.
ROOTS = [
    (suite, version, machine)
    for suite, version in (("bookworm", "3.11"), ("trixie", "3.13"))
    for machine in ("x86_64", "aarch64")
]
TAGS = {"3.11": "cp311-cp311", "3.13": "cp312-abi3"}


def relative_errors(rows: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance of each row [V] from the exact one, relative to that."""
    return np.linalg.norm(rows - exact, axis=1) / np.linalg.norm(exact, axis=1)


def gather(version: str, machine: str, folder: Path) -> Path:
    """Every wheel of ours and, for one Python and processor, those of what the engine needs; gives pip's own."""
    ours = sorted(DIST.glob(f"smallthinker-{__version__}-*.whl"))
    assert ours, "there are no wheels of this version in dist/; run make wheels"
    for wheel in ours:
        shutil.copy(wheel, folder)
    (fitting,) = (
        wheel for wheel in ours if TAGS[version] in wheel.name and wheel.name.endswith(f"_{machine}.whl")
    )
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in (34, 28, 27, 17)] + [
        f"manylinux2014_{machine}"
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, "--only-binary", ":all:"),
            *("--python-version", version, *(f"--platform={name}" for name in platforms), fitting, "pip"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the packages that the engine needs cannot be had: {done.stderr}"
    (pip,) = folder.glob("pip-*.whl")
    return pip


@pytest.fixture(scope="module", params=ROOTS, ids=["-".join(root) for root in ROOTS])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CleanRoot, str, str]:
    suite, version, machine = request.param
    folder = tmp_path_factory.mktemp(suite)
    try:
        root = unpack(suite, machine, folder / "root")
    except MissingError as error:
        pytest.skip(str(error))
    wheels = folder / "wheels"
    wheels.mkdir()
    root.install(wheels, gather(version, machine, wheels))
    shutil.copy(GOLDEN / f"{MODEL}.gguf", root.folder / "model.gguf")
    golden = np.load(GOLDEN / f"{MODEL}.npz")
    np.save(root.folder / "tokens.npy", golden["input_ids"])
    return root, version, machine


def test_the_root_is_what_it_should_be(installed: tuple[CleanRoot, str, str]) -> None:
    root, version, machine = installed
    program = (
        "import importlib.util as util, platform, shutil, runtime_cpu;"
        "print(platform.python_version(), platform.machine(), runtime_cpu.__version__);"
        "print([n for n in ('cc', 'gcc', 'g++', 'c++', 'clang', 'cmake') if shutil.which(n)]);"
        "print([n for n in ('flows', 'components', 'model', 'torch') if util.find_spec(n)])"
    )
    done = root.run(f"{VENV}/bin/python", "-c", program)
    assert done.returncode == 0, done.stderr
    python, found_machine, ours, *nothing = done.stdout.split()
    assert python.startswith(f"{version}.") and (found_machine, ours) == (machine, __version__)
    assert nothing == ["[]"] * 2


def test_the_command_lists_the_engines_commands(installed: tuple[CleanRoot, str, str]) -> None:
    root, *_ = installed
    done = root.smallthinker()
    assert done.returncode == 0 and done.stderr == ""
    names = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert {"chat", "serve", "logits", "inspect", "bench"} <= set(names)


def test_logits_are_those_of_the_development_build(installed: tuple[CleanRoot, str, str]) -> None:
    root, _, machine = installed
    done = root.smallthinker("logits", "/model.gguf", "/tokens.npy", "/logits.npy")
    assert done.returncode == 0, done.stderr
    rows = np.load(root.folder / "logits.npy")
    golden = np.load(GOLDEN / f"{MODEL}.npz")
    if machine == platform.machine():
        with Engine.open(GOLDEN / f"{MODEL}.gguf") as engine:
            np.testing.assert_array_equal(rows, engine.logits(golden["input_ids"]))
    else:  # sums of another width: as near to the exact logits as llama.cpp is, the bar of every kernel here
        ours = relative_errors(rows, golden["logits_exact"])
        theirs = relative_errors(golden["logits_llamacpp"], golden["logits_exact"])
        for share in (50, 90):
            assert np.percentile(ours, share) <= 1.1 * np.percentile(theirs, share)


def test_a_conversation_answers(installed: tuple[CleanRoot, str, str]) -> None:
    root, *_ = installed
    arguments = ("--temperature", "0", "--max-tokens", "8", "--context", "512")
    done = root.smallthinker("chat", "/model.gguf", *arguments, text="hello\n/stats\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "answer 8 tokens" in done.stdout + done.stderr


def test_the_server_starts_and_says_what_it_cannot_read(installed: tuple[CleanRoot, str, str]) -> None:
    root, *_ = installed
    done = root.smallthinker("serve", "/tokens.npy")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
