"""The measuring process of :mod:`runtime_cpu.bench`: opens one engine and obeys JSON lines on stdin.

python -m runtime_cpu.bench_worker ENGINE MODEL THREADS CONTEXT      (then lines such as ["measure", 128, 64, 1])
python -m runtime_cpu.bench_worker bandwidth THREADS…
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime_cpu import Engine, EngineError
from runtime_cpu.engine import available_kernels
from runtime_cpu.memory import peak_resident_bytes

PEER_MODULE = "llama_cpp"
_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "neon",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_BANDWIDTH_BYTES = 128 << 20

Measure = Callable[[list[int], int], dict[str, float]]


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Token ids that no earlier run has used in this order, so that no cache of prompts helps."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()  # type: ignore[no-any-return]


def open_engine(model: str, threads: int, context: int) -> tuple[int, Measure]:
    """Vocabulary size and a measuring function of our engine."""
    engine = Engine.open(model, threads, context, sessions=1)

    def measure(prompt: list[int], decode_tokens: int) -> dict[str, float]:
        with engine.generate(prompt, decode_tokens + 1, stop_ids=()) as generation:
            for _ in generation:
                pass
        stats = generation.stats
        return {"prompt_s": stats.prompt_s, "decode_s": stats.decode_s, "first_token_s": stats.first_token_s}

    return engine.info.vocab_size, measure


def open_peer(model: str, threads: int, context: int) -> tuple[int, Measure]:
    """The same for llama.cpp: prompt in one batch, then greedy decoding token by token."""
    llama_cpp = importlib.import_module(PEER_MODULE)  # optional: no stubs, no dependency
    llama = llama_cpp.Llama(
        model, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, seed=1, verbose=False
    )
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(lambda *_: None), None)

    def measure(prompt: list[int], decode_tokens: int) -> dict[str, float]:
        llama.reset()
        started = time.perf_counter()
        llama.eval(prompt)
        evaluated = time.perf_counter()
        token = llama.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(decode_tokens):
            llama.eval([token])
            token = llama.sample(temp=0.0)
        return {
            "prompt_s": evaluated - started,
            "decode_s": time.perf_counter() - first,
            "first_token_s": first - started,
        }

    return llama.n_vocab(), measure


def peak_memory_bytes() -> int:
    """The most memory that this process has held since it became this program.

    ``getrusage`` would not do: Linux carries the parent's figure over ``exec``.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_resident_bytes()


def read_bandwidth(threads: int) -> float:
    """Bytes per second read by ``threads`` threads, each over an array of its own: best of 5 passes.

    The inner loop is BLAS's dot product of an array with itself, one thread each: one stream of loads.
    """
    size = _BANDWIDTH_BYTES // 4
    arrays = [np.ones(size, np.float32) for _ in range(threads)]
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=np.dot, args=(array, array)) for array in arrays]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, threads * _BANDWIDTH_BYTES / (time.perf_counter() - started))
    return best


def describe_machine() -> dict[str, Any]:
    """Processor, instruction sets, cores, memory and system. No host name: reports get published."""
    cpu, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                cpu = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "kernels": available_kernels(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part; the peer's only when it is installed."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    for name, package in (("smallthinker", "smallthinker"), (PEER_MODULE, "llama-cpp-python")):
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _serve(engine: str, model: str, threads: int, context: int) -> int:
    vocab_size: int | None = None
    measure: Measure | None = None
    for line in sys.stdin:
        operation, *values = json.loads(line)
        answer: dict[str, Any]
        try:
            if operation == "hello":
                vocab_size, measure = (open_peer if engine == PEER_MODULE else open_engine)(
                    model, threads, context
                )
                answer = {"ready": True}
            elif operation == "memory":
                answer = {"peak_rss_bytes": peak_memory_bytes()}
            else:
                assert measure is not None and vocab_size is not None
                prompt_tokens, decode_tokens, seed = values
                answer = dict(measure(random_ids(vocab_size, prompt_tokens, seed), decode_tokens))
        except (EngineError, ValueError, OSError) as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "bandwidth":
        sys.stdout.write(
            json.dumps({count: round(read_bandwidth(int(count))) for count in sys.argv[2:]}) + "\n"
        )
    else:
        sys.exit(_serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
