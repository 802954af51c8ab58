"""One engine in a process of its own, which measures when it is asked to (``worker.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from runtime_cpu.bench.machine import MemoryCgroup, busy_cpu_s, process_cpu_s
from runtime_cpu.bench.worker import PEER_MODULE, versions
from runtime_cpu.bench.workload import BenchError, Workload
from runtime_cpu.synth.routing import text_like_ids


class MeasuringProcess:
    """A child process that measures when it is asked to.

    Attributes:
        group: the memory cgroup that it runs in, if there is one.
        versions, vocab_size, settings: what it said of itself and its model.
    """

    def __init__(self, workload: Workload, engine: str, threads: int, group: MemoryCgroup | None) -> None:
        self.engine, self.threads, self.group = engine, threads, group
        command = [sys.executable, "-m", "runtime_cpu.bench.worker"]
        if engine == PEER_MODULE and workload.peer_python is not None:
            command = _peer_command(workload.peer_python)
        settings = {
            "engine": engine,
            "model": str(
                workload.peer_model if engine == PEER_MODULE and workload.peer_model else workload.model
            ),
            "threads": threads,
            "context": workload.context,
            "memory_bytes": workload.memory_bytes,
            "repack": workload.memory_bytes is None,
            "kv_type": workload.kv_type,
            "head": workload.head,
        }
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads)},
            preexec_fn=None if group is None else group.enter,
        )
        try:
            hello = self.ask("hello")
            self.versions: dict[str, str] = hello["versions"]
            self.vocab_size: int = hello["vocab_size"]
            self.settings: dict[str, str] = hello["settings"]
        except BenchError:
            self.close()
            raise

    def ask(self, operation: str, **values: Any) -> dict[str, Any]:
        """The answer to one line of ``worker.py``'s protocol.

        Raises:
            BenchError: the process reports an error, or has ended.
        """
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps([operation, values] if values else [operation]) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            killed = " (out of memory)" if code == -9 and self.group is not None else ""
            raise BenchError(f"the {self.engine} process ended with code {code}{killed}")
        result: dict[str, Any] = json.loads(answer)
        if "error" in result:
            raise BenchError(result["error"])
        return result

    def measure(self, workload: Workload, run: int) -> dict[str, Any]:
        """One run, with the cores that other processes kept busy meanwhile."""
        make = text_like_ids if workload.text_like else _random_ids
        values = {
            "before": make(self.vocab_size, workload.depth, 0),
            "prompt": make(self.vocab_size, workload.prompt_tokens, run + 1),
            "decode_tokens": workload.decode_tokens,
        }
        busy, own, started = busy_cpu_s(), process_cpu_s(self._process.pid), time.perf_counter()
        result = self.ask("measure", **values)
        seconds = time.perf_counter() - started
        busy_after, own_after = busy_cpu_s(), process_cpu_s(self._process.pid)
        if busy is not None and own is not None and busy_after is not None and own_after is not None:
            result["others_cores"] = max(0.0, (busy_after - busy) - (own_after - own)) / seconds
        return result

    def close(self) -> None:
        """End the process: by the end of its input, and by force when that takes too long."""
        stdin, stdout = self._pipes()
        with suppress(BrokenPipeError):
            stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stdout.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout


def _random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Token ids that no earlier run has used in this order, so that no cache of prompts helps."""
    ids: list[int] = np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
    return ids


def _peer_command(python: Path) -> list[str]:
    # By its file: that environment need not have our package.
    return [str(python), str(Path(__file__).resolve().with_name("worker.py"))]


def require_peer(python: Path | None) -> None:
    """Make sure that llama.cpp can be measured, here or by the interpreter ``python``.

    Raises:
        BenchError: the interpreter cannot be run, or there is no package llama-cpp-python.
    """
    if python is None:
        found = versions()
    else:
        try:
            done = subprocess.run([*_peer_command(python), "versions"], capture_output=True, text=True)
        except OSError as error:
            raise BenchError(f"--peer-python {python} cannot be run: {error.strerror}") from error
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it says nothing"]
            raise BenchError(f"--peer-python {python} fails: {said[-1]}")
        found = json.loads(done.stdout)
    if PEER_MODULE not in found:
        where = "" if python is None else f" in the environment of {python}"
        raise BenchError(
            f"--peer needs the package llama-cpp-python{where}: pip install 'smallthinker[peer]'"
        )
