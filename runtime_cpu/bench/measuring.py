"""Measuring every combination of engine and thread count in processes of their own: ``bench(workload)``.

The runs are interleaved (every combination once, then again), so that a busy moment of the machine hits all alike.
llama.cpp is measured through the package llama-cpp-python, in this environment or in that of another interpreter. With
a memory limit every process gets a memory cgroup of that size where one can be made, and llama.cpp runs without
repacking: its repacked copy of the weights would not fit where the mapped file does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import numpy as np

from runtime_cpu import _core
from runtime_cpu.bench.machine import MachineError, MemoryCgroup, busy_cpu_s, drop_cached, process_cpu_s
from runtime_cpu.bench.report import Row, Spread
from runtime_cpu.bench.worker import PEER_MODULE, versions
from runtime_cpu.memory.plan import format_bytes
from runtime_cpu.memory.traffic import kv_bytes, skips_silent_neurons, weight_bytes
from runtime_cpu.synth.routing import text_like_ids

OURS = "runtime_cpu"


class BenchError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True)
class Workload:
    """What to measure.

    Attributes:
        depth: tokens put into the context before the prompt, not timed.
        decode_tokens: tokens generated after the first; 0 measures prompts only.
        memory_bytes: limit of every process.
        text_like: prompts whose tokens share experts as those of text do, for files of :mod:`runtime_cpu.synth`;
            otherwise tokens are independent.
        kv_type, head: of our engine, as :meth:`Engine.open` takes them.
        peer_python: interpreter that has the peer's package; by default this one.
        peer_model: the file that the peer reads; by default ``model``.
    """

    model: Path
    thread_counts: Sequence[int]
    runs: int = 5
    prompt_tokens: int = 128
    decode_tokens: int = 64
    depth: int = 0
    engines: Sequence[str] = (OURS,)
    memory_bytes: int | None = None
    text_like: bool = False
    kv_type: str = "auto"
    head: str = "exact"
    peer_python: Path | None = None
    peer_model: Path | None = None

    @property
    def context(self) -> int:
        """Tokens that a sequence needs room for."""
        return self.depth + self.prompt_tokens + self.decode_tokens + 1


class _Process:
    """A child process that measures on command."""

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


def bench(
    workload: Workload, progress: Callable[[str], None] | None = None
) -> tuple[list[Row], dict[str, str], list[str]]:
    """Measure every engine with every thread count, ``runs`` times after one warm-up.

    Args:
        progress: called with a few words before every measurement.

    Returns:
        The rows, the versions that the processes reported, and notes on what could not be done as asked.

    Raises:
        BenchError: a child could not open the model or failed. A peer that does so under a memory limit is a note.
    """
    notes: list[str] = []
    found: dict[str, str] = {}
    workers: list[_Process] = []
    results: dict[int, list[dict[str, Any]]] = {}
    dead: set[int] = set()
    with ExitStack() as stack:
        if workload.memory_bytes is not None:
            for model in {workload.model, workload.peer_model or workload.model}:
                drop_cached(model)
        for engine in workload.engines:
            for threads in workload.thread_counts:
                group = _group(workload, f"smallthinker-bench-{os.getpid()}-{engine}-{threads}", notes)
                if group is not None:
                    stack.callback(group.remove)
                try:
                    worker = _Process(workload, engine, threads, group)
                except BenchError as error:
                    if engine != PEER_MODULE or workload.memory_bytes is None:
                        raise
                    notes.append(f"{engine}, {threads} threads: {error}")
                    continue
                stack.callback(worker.close)
                workers.append(worker)
                found = {**worker.versions, **found}
        for run in range(workload.runs + 1):  # run 0 warms up
            for index, worker in enumerate(workers):
                if index in dead:
                    continue
                if progress is not None:
                    progress(f"run {run} of {workload.runs}: {worker.engine}, {worker.threads} threads")
                try:
                    result = worker.measure(workload, run)
                except BenchError as error:
                    if worker.engine != PEER_MODULE or workload.memory_bytes is None:
                        raise
                    notes.append(f"{worker.engine}, {worker.threads} threads: {error}")
                    dead.add(index)
                    continue
                if run:
                    results.setdefault(index, []).append(result)
        rows = [
            _row(workload, worker, results[index])
            for index, worker in enumerate(workers)
            if index not in dead
        ]
    return rows, found, notes


def _group(workload: Workload, name: str, notes: list[str]) -> MemoryCgroup | None:
    if workload.memory_bytes is None:
        return None
    try:
        return MemoryCgroup(workload.memory_bytes, name)
    except MachineError as error:
        note = f"the limit of {format_bytes(workload.memory_bytes)} is not enforced by the kernel: {error}"
        if note not in notes:
            notes.append(note)
        return None


def _row(workload: Workload, worker: _Process, measured: Sequence[dict[str, Any]]) -> Row:
    decode = [workload.decode_tokens / item["decode_s"] for item in measured if item["decode_s"] > 0]
    others = [item["others_cores"] for item in measured if "others_cores" in item]
    active = _mean(measured, "active_neuron_share")
    named = _mean(measured, "head_row_share")
    predicts = worker.settings.get("head") == "predictor"
    model = _core.Model.open(str(workload.model))
    # What llama.cpp reads: every neuron.
    skips = active is not None and skips_silent_neurons(model, worker.settings["kernels"])
    sparsity = 1 - active if skips and active is not None else 0.0
    middle = workload.depth + workload.prompt_tokens + workload.decode_tokens // 2  # of the answer
    return Row(
        engine=worker.engine,
        threads=worker.threads,
        prompt_tokens=workload.prompt_tokens,
        decode_tokens=workload.decode_tokens,
        depth=workload.depth,
        prompt_tokens_per_s=Spread.of(workload.prompt_tokens / item["prompt_s"] for item in measured),
        decode_tokens_per_s=Spread.of(decode) if workload.decode_tokens else None,
        first_token_s=Spread.of(item["first_token_s"] for item in measured),
        peak_rss_bytes=worker.ask("memory")["peak_rss_bytes"],
        memory_bytes=workload.memory_bytes,
        cgroup_peak_bytes=None if worker.group is None else worker.group.peak_bytes(),
        active_neuron_share=active,
        kv_type=worker.settings["kv_type"],
        head=worker.settings.get("head"),
        head_row_share=named,
        weight_bytes_per_token=weight_bytes(model, sparsity, named if predicts else None),
        kv_bytes_per_token=kv_bytes(model, middle, worker.settings["kv_type"]),
        cache_hit_rate=_spread(measured, "cache_hit_rate"),
        bytes_read_per_token=_spread(measured, "bytes_read_per_token") if workload.decode_tokens else None,
        others_cores=Spread.of(others) if others else None,
    )


def _mean(measured: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [item[name] for item in measured if name in item]
    return fmean(values) if values else None


def _spread(measured: Sequence[dict[str, Any]], name: str) -> Spread | None:
    values = [item[name] for item in measured if name in item]
    return Spread.of(values) if values else None


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
