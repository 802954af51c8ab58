"""Speed and memory of a model on this machine: ``python -m runtime_cpu.bench MODEL [--json OUT] [--peer]``.

Each combination of engine and thread count lives in a process of its own; the runs are interleaved (every
combination once, then again), so that a busy moment of the machine hits all alike. ``--peer`` adds llama.cpp through
the package llama-cpp-python, in this environment or in that of ``--peer-python``. With ``--memory`` every process gets
a memory cgroup of that size where one can be made, and llama.cpp runs without repacking: its repacked copy of the
weights would not fit where the mapped file does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import numpy as np

from runtime_cpu import EngineError, _core, bench_worker
from runtime_cpu.bench_machine import (
    MachineError,
    MemoryCgroup,
    busy_cpu_s,
    contention,
    describe_machine,
    disk_rate,
    drop_cached,
    process_cpu_s,
    read_bandwidth,
)
from runtime_cpu.bench_report import ReportError, Row, Spread, log_to_mlflow, plot, ratios, table
from runtime_cpu.bench_worker import PEER_MODULE, versions
from runtime_cpu.engine import model_file
from runtime_cpu.head_predictor import HEADS
from runtime_cpu.memory import format_bytes, parse_bytes
from runtime_cpu.options import add_kv_option
from runtime_cpu.synth import text_like_ids
from runtime_cpu.traffic import kv_bytes, skips_silent_neurons, weight_bytes

__all__ = ["BenchError", "Plan", "Row", "Spread", "bench", "main"]

OURS = "runtime_cpu"
_FORMAT_VERSION = 2


class BenchError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True)
class Plan:
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


class _Worker:
    """A child process that measures on command."""

    def __init__(self, plan: Plan, engine: str, threads: int, group: MemoryCgroup | None) -> None:
        self.engine, self.threads, self.group = engine, threads, group
        command = [sys.executable, "-m", "runtime_cpu.bench_worker"]
        if engine == PEER_MODULE and plan.peer_python is not None:
            command = _peer_command(plan.peer_python)
        settings = {
            "engine": engine,
            "model": str(plan.peer_model if engine == PEER_MODULE and plan.peer_model else plan.model),
            "threads": threads,
            "context": plan.context,
            "memory_bytes": plan.memory_bytes,
            "repack": plan.memory_bytes is None,
            "kv_type": plan.kv_type,
            "head": plan.head,
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

    def measure(self, plan: Plan, run: int) -> dict[str, Any]:
        """One run, with the cores that other processes kept busy meanwhile."""
        make = text_like_ids if plan.text_like else _random_ids
        values = {
            "before": make(self.vocab_size, plan.depth, 0),
            "prompt": make(self.vocab_size, plan.prompt_tokens, run + 1),
            "decode_tokens": plan.decode_tokens,
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
    # -I: this folder holds modules that are called as some of the standard library's.
    return [str(python), "-I", str(Path(bench_worker.__file__).resolve())]


def bench(plan: Plan) -> tuple[list[Row], dict[str, str], list[str]]:
    """Measure every engine with every thread count, ``runs`` times after one warm-up.

    Returns:
        The rows, the versions that the processes reported, and notes on what could not be done as asked.

    Raises:
        BenchError: a child could not open the model or failed. A peer that does so under a memory limit is a note.
    """
    notes: list[str] = []
    found: dict[str, str] = {}
    workers: list[_Worker] = []
    results: dict[int, list[dict[str, Any]]] = {}
    dead: set[int] = set()
    with ExitStack() as stack:
        if plan.memory_bytes is not None:
            for model in {plan.model, plan.peer_model or plan.model}:
                drop_cached(model)
        for engine in plan.engines:
            for threads in plan.thread_counts:
                group = _group(plan, f"smallthinker-bench-{os.getpid()}-{engine}-{threads}", notes)
                if group is not None:
                    stack.callback(group.remove)
                try:
                    worker = _Worker(plan, engine, threads, group)
                except BenchError as error:
                    if engine != PEER_MODULE or plan.memory_bytes is None:
                        raise
                    notes.append(f"{engine}, {threads} threads: {error}")
                    continue
                stack.callback(worker.close)
                workers.append(worker)
                found = {**worker.versions, **found}
        for run in range(plan.runs + 1):  # run 0 warms up
            for index, worker in enumerate(workers):
                if index in dead:
                    continue
                _progress(f"run {run} of {plan.runs}: {worker.engine}, {worker.threads} threads")
                try:
                    result = worker.measure(plan, run)
                except BenchError as error:
                    if worker.engine != PEER_MODULE or plan.memory_bytes is None:
                        raise
                    notes.append(f"{worker.engine}, {worker.threads} threads: {error}")
                    dead.add(index)
                    continue
                if run:
                    results.setdefault(index, []).append(result)
        rows = [
            _row(plan, worker, results[index]) for index, worker in enumerate(workers) if index not in dead
        ]
    return rows, found, notes


def _group(plan: Plan, name: str, notes: list[str]) -> MemoryCgroup | None:
    if plan.memory_bytes is None:
        return None
    try:
        return MemoryCgroup(plan.memory_bytes, name)
    except MachineError as error:
        note = f"the limit of {format_bytes(plan.memory_bytes)} is not enforced by the kernel: {error}"
        if note not in notes:
            notes.append(note)
        return None


def _row(plan: Plan, worker: _Worker, measured: Sequence[dict[str, Any]]) -> Row:
    decode = [plan.decode_tokens / item["decode_s"] for item in measured if item["decode_s"] > 0]
    others = [item["others_cores"] for item in measured if "others_cores" in item]
    active = _mean(measured, "active_neuron_share")
    named = _mean(measured, "head_row_share")
    predicts = worker.settings.get("head") == "predictor"
    model = _core.Model.open(str(plan.model))
    # What llama.cpp reads: every neuron.
    skips = active is not None and skips_silent_neurons(model, worker.settings["kernels"])
    sparsity = 1 - active if skips and active is not None else 0.0
    middle = plan.depth + plan.prompt_tokens + plan.decode_tokens // 2  # of the answer
    return Row(
        engine=worker.engine,
        threads=worker.threads,
        prompt_tokens=plan.prompt_tokens,
        decode_tokens=plan.decode_tokens,
        depth=plan.depth,
        prompt_tokens_per_s=Spread.of(plan.prompt_tokens / item["prompt_s"] for item in measured),
        decode_tokens_per_s=Spread.of(decode) if plan.decode_tokens else None,
        first_token_s=Spread.of(item["first_token_s"] for item in measured),
        peak_rss_bytes=worker.ask("memory")["peak_rss_bytes"],
        memory_bytes=plan.memory_bytes,
        cgroup_peak_bytes=None if worker.group is None else worker.group.peak_bytes(),
        active_neuron_share=active,
        kv_type=worker.settings["kv_type"],
        head=worker.settings.get("head"),
        head_row_share=named,
        weight_bytes_per_token=weight_bytes(model, sparsity, named if predicts else None),
        kv_bytes_per_token=kv_bytes(model, middle, worker.settings["kv_type"]),
        cache_hit_rate=_spread(measured, "cache_hit_rate"),
        bytes_read_per_token=_spread(measured, "bytes_read_per_token") if plan.decode_tokens else None,
        others_cores=Spread.of(others) if others else None,
    )


def _mean(measured: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [item[name] for item in measured if name in item]
    return fmean(values) if values else None


def _spread(measured: Sequence[dict[str, Any]], name: str) -> Spread | None:
    values = [item[name] for item in measured if name in item]
    return Spread.of(values) if values else None


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the model or an option is unusable."""
    options = _parser().parse_args(arguments)
    try:
        plan = _plan(options)
        model = _core.Model.open(str(plan.model))
        if plan.context > model.context_length:
            raise BenchError(
                f"--prompt {plan.prompt_tokens}, --decode {plan.decode_tokens} and --depth {plan.depth} do not fit "
                f"into the model's context of {model.context_length} tokens"
            )
        if PEER_MODULE in plan.engines:
            _require_peer(plan.peer_python)
        _progress("memory and disk")
        before = read_bandwidth(plan.thread_counts)
        disk = {"before": disk_rate(plan.model)}
        with contention(options.contend):
            rows, found, notes = bench(plan)
        _progress("memory and disk")
        after = read_bandwidth(plan.thread_counts)
        disk["after"] = disk_rate(plan.model)
        _progress("")
        if options.contend:
            notes.append("another process burned one core meanwhile")
        compared = ratios(rows, OURS, PEER_MODULE)
        report = {
            "format_version": _FORMAT_VERSION,
            "machine": describe_machine(),
            "versions": {**versions(), **found},
            "command": [
                "python",
                "-m",
                "runtime_cpu.bench",
                *(sys.argv[1:] if arguments is None else arguments),
            ],
            "model": {
                "file": plan.model.name,
                "file_type": model.file_type,
                "file_bytes": model.file_bytes,
                "parameters": model.parameters,
                "bytes_per_token": weight_bytes(model),
            },
            "read_bytes_per_s": {count: max(before[count], after[count]) for count in before},
            "bandwidth": {"before": before, "after": after},
            "disk": disk,
            "contended": options.contend,
            "text_like": options.text_like,
            "rows": [asdict(row) for row in rows],
            "ratios": [asdict(ratio) for ratio in compared],
            "notes": notes,
        }
        text = json.dumps(report, indent=2) + "\n"
        if options.json == "-":
            sys.stderr.write(table(report, rows, compared))
            sys.stdout.write(text)
        else:
            sys.stdout.write(table(report, rows, compared))
        if options.json not in (None, "-"):
            try:
                Path(options.json).write_text(text)
            except OSError as error:
                raise BenchError(f"cannot write {options.json}: {error.strerror}") from error
        if options.plot is not None:
            plot(report, rows, options.plot)
        if options.mlflow is not None:
            log_to_mlflow(report, rows, options.mlflow)
    except (OSError, ValueError, EngineError, BenchError, MachineError, ReportError) as error:
        _progress("")
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.bench",
        description="Measure prompt and decoding speed, latency and memory.",
    )
    add = parser.add_argument
    add("model", type=Path, help="GGUF file")
    add("--threads", help="thread counts, such as 1,2,4 (default: 1 and all allowed cores)")
    add("--runs", type=int, default=5, help="measured runs (default: %(default)s)")
    add("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    add("--decode", type=int, default=64, help="tokens generated (default: %(default)s)")
    add("--prompt-only", action="store_true", help="generate nothing after the first token")
    add("--depth", type=int, default=0, help="tokens already in the context (default: %(default)s)")
    add(
        "--text-like",
        action="store_true",
        help="prompts of a synthetic model's text-like ids (default: independent ids)",
    )
    add("--memory", metavar="SIZE", help="limit of every process, such as 1GiB")
    add_kv_option(parser)
    add(
        "--head",
        choices=HEADS,
        default="exact",
        help="predictor: our engine's predicted head, which can lose tokens",
    )
    add("--contend", action="store_true", help="meanwhile another process burns one core")
    add("--json", metavar="OUT", help="write everything measured to this file; - for standard output")
    add("--plot", metavar="PNG", type=Path, help="draw the speeds (package matplotlib)")
    add("--mlflow", metavar="EXPERIMENT", help="log the report to this experiment (package mlflow)")
    add("--peer", action="store_true", help="measure llama.cpp too (package llama-cpp-python)")
    add("--peer-only", action="store_true", help="measure llama.cpp alone")
    add(
        "--peer-python", metavar="PATH", type=Path, help="the interpreter that has llama-cpp-python and numpy"
    )
    add(
        "--peer-model",
        metavar="PATH",
        type=Path,
        help="llama.cpp's file where it cannot read ours (packed, or with a predicted head)",
    )
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, least in (("runs", 1), ("prompt", 1), ("decode", 1), ("depth", 0)):
        if getattr(options, name) < least:
            raise BenchError(f"--{name} is {getattr(options, name)}; allowed is {least} and more")
    for model in (options.model, options.peer_model or options.model):
        model_file(model)
    peer = [PEER_MODULE] if options.peer or options.peer_only else []
    return Plan(
        model=options.model,
        thread_counts=_thread_counts(options.threads, cores),
        runs=options.runs,
        prompt_tokens=options.prompt,
        decode_tokens=0 if options.prompt_only else options.decode,
        depth=options.depth,
        engines=peer if options.peer_only else [OURS, *peer],
        memory_bytes=None if options.memory is None else parse_bytes(options.memory),
        text_like=options.text_like,
        kv_type=options.kv,
        head=options.head,
        peer_python=options.peer_python,
        peer_model=options.peer_model,
    )


def _require_peer(python: Path | None) -> None:
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


def _thread_counts(text: str | None, cores: int) -> list[int]:
    if text is None:
        return sorted({1, cores})
    counts = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if not all(1 <= count <= 256 for count in counts):
        raise BenchError(f"--threads is {text!r}; write numbers from 1 to 256 with commas between")
    return sorted(set(counts))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
