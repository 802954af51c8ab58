"""The C++ core on processors that this machine is not: older x86, and 64-bit Arm with each set of NEON kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "infra" / "setup" / "cross_tests.sh"
TOOL_MISSING = 77
PROCESSORS = {"aarch64": ("cortex-a53", "cortex-a76", "max"), "x86_64": ("Nehalem", "Haswell")}


def run(machine: str, *parts: str) -> str:
    """Run parts of core_tests (none: the quick ones) for each processor; skips when a tool is missing."""
    done = subprocess.run([str(SCRIPT), machine, *parts], capture_output=True, text=True, check=False)
    if done.returncode == TOOL_MISSING:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("machine", PROCESSORS)
def test_kernels_of_other_processors(machine: str) -> None:
    output = run(machine)
    for processor in PROCESSORS[machine]:
        assert f"{machine} {processor}: half kernels packed golden: ok" in output


def test_a_missing_tool_is_named_in_one_sentence() -> None:
    done = subprocess.run(
        ["/bin/bash", str(SCRIPT), "aarch64"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/nowhere"},
    )
    assert done.returncode == TOOL_MISSING
    assert done.stderr.startswith("cross tests: not run, there is no ") and done.stderr.count("\n") == 1


def test_other_machines_are_refused() -> None:
    done = subprocess.run([str(SCRIPT), "vax"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "aarch64 or x86_64" in done.stderr


@pytest.mark.campaign
@pytest.mark.parametrize("machine", PROCESSORS)
def test_whole_core_on_other_processors(machine: str) -> None:
    run(
        machine,
        "half",
        "kernels",
        "packed",
        "pool",
        "sampler",
        "checksum",
        "file",
        "cache",
        "policies",
        "reader",
        "forward",
        "golden",
    )
