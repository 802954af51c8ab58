"""Calls the engine's own commands, as an operator would: ``engine_command("perplexity", [...], timeout_s=60)``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from components.artifacts import PROJECT, StageError


def engine_command(name: str, arguments: Sequence[str], timeout_s: float) -> str:
    """Standard output of ``python -m runtime_cpu.<name> arguments``, in a process of its own.

    Raises:
        StageError: it failed or took longer than ``timeout_s``; the sentence repeats its reason.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"runtime_cpu.{name}", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            cwd=PROJECT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise StageError(f"runtime_cpu.{name} took longer than timeout_s = {timeout_s:g}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise StageError(
            f"runtime_cpu.{name} failed on {Path(arguments[0]).name} with code {done.returncode}: "
            f"{last.removeprefix('error: ')}"
        )
    return done.stdout
