"""What :meth:`Engine.open` may be asked for: the values that are allowed, and the defaults of this machine.

threads = choose_threads(None)          # the cores that this process may use
kernels = choose_kernels("avx2")        # ValueError on a machine without it
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from runtime_cpu import _core

KERNELS_VARIABLE = "RUNTIME_CPU_KERNELS"
MAX_THREADS = 256
CHUNK_TOKENS = 256
MAX_CHUNK_TOKENS = 4096
MAX_SESSIONS = 1024
KV_TYPES = ("auto", "f32", "f16", "q8")


def available_cores() -> int:
    """How many cores this process may use: fewer than the machine has under ``taskset`` or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_kernels() -> list[str]:
    """Names of the kernel sets that this machine can run, slowest first."""
    return _core.available_kernels()


def choose_threads(threads: int | None) -> int:
    """``threads``, by default the available cores.

    Raises:
        ValueError: not a whole number from 1 to :data:`MAX_THREADS`.
    """
    if threads is None:
        return min(available_cores(), MAX_THREADS)
    return whole_number("threads", threads, 1, MAX_THREADS)


def choose_kernels(kernels: str | None) -> str:
    """``kernels``, else those that the environment names, else ``"auto"``.

    Raises:
        ValueError: this machine cannot run them, or nobody can.
    """
    kernels = kernels or os.environ.get(KERNELS_VARIABLE) or "auto"
    allowed = ["auto", *available_kernels()]
    if kernels not in allowed:
        raise ValueError(f"kernels is {kernels!r}; this machine offers {', '.join(allowed)}")
    return kernels


def check_kv_type(kv_type: str) -> None:
    """Refuse what is none of :data:`KV_TYPES`.

    Raises:
        ValueError: it is none.
    """
    if kv_type not in KV_TYPES:
        raise ValueError(f"kv_type is {kv_type!r}; allowed are {', '.join(map(repr, KV_TYPES))}")


def whole_number(name: str, value: int, low: int, high: int) -> int:
    """``value``, the argument called ``name``.

    Raises:
        ValueError: it is no whole number from ``low`` to ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed is a whole number from {low} to {high}")
    return value


def model_file(path: str | os.PathLike[str]) -> Path:
    """``path`` if a file is there.

    Raises:
        FileNotFoundError: none is; for the folder of a checkpoint the message says how to make one.
    """
    file = Path(path)
    if file.is_file():
        return file
    if (file / "config.json").is_file():
        name = file.resolve().name
        command = f"python -m runtime_cpu.pack {shlex.quote(str(file))} {shlex.quote(name + '.gguf')}"
        raise FileNotFoundError(
            f"{file} is a folder in Hugging Face's format, which has to be packed first: {command}"
        )
    if file.is_dir():
        raise FileNotFoundError(f"{file} is a folder; give the GGUF file in it")
    raise FileNotFoundError(f"there is no model file at {file}")
