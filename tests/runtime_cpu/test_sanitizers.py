"""The C++ core's own tests, warnings as errors, under ASan and UBSan, and under TSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.waiting import CEILING_S

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "gguf"
SANITIZERS = {"address": "sanitize", "thread": "sanitize-thread"}

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake and a C++ compiler")


def build(sanitizer: str) -> Path:
    """Build core_tests (only what changed since the last time) and return the program."""
    folder = ROOT / "build" / SANITIZERS[sanitizer]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [
        f"-DSMALLTHINKER_SANITIZE={sanitizer}",
        "-DSMALLTHINKER_MODULE=OFF",
        "-DSMALLTHINKER_TESTS=ON",
        "-DSMALLTHINKER_WERROR=ON",
    ]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *options]
    for command in (
        configure,
        ["cmake", "--build", str(folder), "--parallel", "2", "--target", "core_tests"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return folder / "core_tests"


def run(program: Path, *arguments: str) -> str:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(program), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=4 * CEILING_S
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stdout


def test_core_under_address_and_undefined_behaviour_sanitizers() -> None:
    output = run(build("address"), "--golden", str(GOLDEN), "--fuzz", "20000")
    for part in (
        "kernels reference",
        "thread pool",
        "sampler",
        "vocabulary: ok",
        "reader",
        "reader fuzz: 20000",
        "coverage: 10000 cases",
        "forward",
        "golden: 6",
        "checksum: ok",
        "file reader page_cache: ok",
        "expert cache: ",
        "cache policies: ok",
    ):
        assert part in output
    assert "all tests passed" in output


def test_threads_under_thread_sanitizer() -> None:
    output = run(build("thread"), "pool", "forward", "offload", "file", "cache")
    for part in (
        "thread pool: ok",
        "forward: ok",
        "offload: ok",
        "file reader page_cache: ok",
        "expert cache: ",
    ):
        assert part in output


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(2, 12))
def test_reader_fuzz_campaign(seed: int) -> None:
    run(build("address"), "--fuzz", "200000", "--seed", str(seed), "fuzz")


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(2, 6))
def test_coverage_guided_campaign(seed: int) -> None:
    assert "coverage: 200000 cases" in run(
        build("address"), "--coverage", "200000", "--seed", str(seed), "coverage"
    )
