"""Speed and memory of a model on this machine: ``python -m runtime_cpu.bench MODEL [--json OUT] [--peer]``.

Each combination of engine and thread count lives in a process of its own; the runs are interleaved (every
combination once, then again), so that a busy moment of the machine hits all alike. ``--peer`` adds llama.cpp through
the package llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from runtime_cpu import EngineError, _core
from runtime_cpu.bench_worker import PEER_MODULE, describe_machine, versions
from runtime_cpu.memory import format_bytes

_FORMAT_VERSION = 1


class BenchError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """From the single values."""
        runs = tuple(values)
        return cls(median(runs), min(runs), max(runs), runs)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


@dataclass(frozen=True)
class Row:
    """One combination's outcome; ``first_token_s`` is the time from a prompt of ``prompt_tokens`` to the first."""

    engine: str
    threads: int
    prompt_tokens: int
    decode_tokens: int
    prompt_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    first_token_s: Spread
    peak_rss_bytes: int


class _Worker:
    """A child process that measures on command."""

    def __init__(self, engine: str, model: Path, threads: int, context: int) -> None:
        self.engine, self.threads = engine, threads
        command = [
            sys.executable,
            "-m",
            "runtime_cpu.bench_worker",
            engine,
            str(model),
            str(threads),
            str(context),
        ]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask("hello")

    def ask(self, operation: str, *values: int) -> dict[str, Any]:
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps([operation, *values]) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise BenchError(f"the {self.engine} process ended with code {self._process.wait()}")
        result: dict[str, Any] = json.loads(answer)
        if "error" in result:
            raise BenchError(result["error"])
        return result

    def close(self) -> None:
        self._pipes()[0].close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipes()[1].close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout


def bench(
    model: Path,
    thread_counts: Sequence[int],
    runs: int,
    prompt_tokens: int,
    decode_tokens: int,
    engines: Sequence[str] = ("runtime_cpu",),
) -> list[Row]:
    """Measure every engine with every thread count, ``runs`` times after one warm-up.

    Raises:
        BenchError: a child could not open the model or failed.
    """
    context = prompt_tokens + decode_tokens + 1
    workers: list[_Worker] = []
    results: dict[int, list[dict[str, Any]]] = {}
    try:
        for engine in engines:
            workers.extend(_Worker(engine, model, threads, context) for threads in thread_counts)
        for run in range(runs + 1):  # run 0 warms up
            for index, worker in enumerate(workers):
                _progress(f"run {run} of {runs}: {worker.engine}, {worker.threads} threads")
                result = worker.ask("measure", prompt_tokens, decode_tokens, run)
                if run:
                    results.setdefault(index, []).append(result)
        rows = []
        for index, worker in enumerate(workers):
            measured = results[index]
            rows.append(
                Row(
                    engine=worker.engine,
                    threads=worker.threads,
                    prompt_tokens=prompt_tokens,
                    decode_tokens=decode_tokens,
                    prompt_tokens_per_s=Spread.of(prompt_tokens / item["prompt_s"] for item in measured),
                    decode_tokens_per_s=Spread.of(decode_tokens / item["decode_s"] for item in measured),
                    first_token_s=Spread.of(item["first_token_s"] for item in measured),
                    peak_rss_bytes=worker.ask("memory")["peak_rss_bytes"],
                )
            )
        return rows
    finally:
        for worker in workers:
            worker.close()


def bytes_per_token(model: _core.Model) -> int:
    """Bytes of weights that computing one token reads when no neuron is skipped (KV cache not counted)."""
    total = 0
    for name, _kind, shape, _offset, size in model.tensors():
        if name == "token_embd.weight" and not model.tied_embeddings:
            total += size // shape[-1]
        elif "_exps." in name:
            total += size * model.experts_per_token // model.experts
        else:
            total += size
    return total


def read_bandwidth(thread_counts: Sequence[int]) -> dict[str, int]:
    """Bytes per second that so many threads of a child process read from memory, by number of threads."""
    command = [sys.executable, "-m", "runtime_cpu.bench_worker", "bandwidth", *map(str, thread_counts)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise BenchError(f"measuring memory bandwidth failed: {done.stderr.strip().splitlines()[-1:]}")
    speeds: dict[str, int] = json.loads(done.stdout)
    return speeds


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the model or an option is unusable."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.bench",
        description="Measure prompt and decoding speed, latency and memory.",
    )
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--threads", help="thread counts, such as 1,2,4 (default: 1 and all allowed cores)")
    parser.add_argument("--runs", type=int, default=5, help="measured runs (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=64, help="tokens generated (default: %(default)s)")
    parser.add_argument(
        "--json", metavar="OUT", help="write everything measured to this file; - for standard output"
    )
    parser.add_argument(
        "--peer", action="store_true", help="measure llama.cpp too (package llama-cpp-python)"
    )
    options = parser.parse_args(arguments)
    try:
        counts = _thread_counts(options.threads, cores)
        for name in ("runs", "prompt", "decode"):
            if getattr(options, name) < 1:
                raise BenchError(f"--{name} is {getattr(options, name)}; allowed is 1 and more")
        if not options.model.is_file():
            raise BenchError(f"there is no model file at {options.model}")
        model = _core.Model.open(str(options.model))
        if options.prompt + options.decode >= model.context_length:
            raise BenchError(
                f"--prompt {options.prompt} and --decode {options.decode} do not fit into the model's context of "
                f"{model.context_length} tokens"
            )
        engines = ["runtime_cpu", *([PEER_MODULE] if options.peer else [])]
        known_versions = versions()
        if options.peer and PEER_MODULE not in known_versions:
            raise BenchError("--peer needs the package llama-cpp-python: pip install llama-cpp-python")
        rows = bench(options.model, counts, options.runs, options.prompt, options.decode, engines)
        _progress("memory bandwidth")
        bandwidth = read_bandwidth(counts)
    except (OSError, EngineError, BenchError) as error:
        _progress("")
        sys.stderr.write(f"error: {error}\n")
        return 2
    _progress("")
    report = {
        "format_version": _FORMAT_VERSION,
        "machine": describe_machine(),
        "versions": known_versions,
        "command": ["python", "-m", "runtime_cpu.bench", *(sys.argv[1:] if arguments is None else arguments)],
        "model": {
            "file": options.model.name,
            "file_type": model.file_type,
            "file_bytes": model.file_bytes,
            "parameters": model.parameters,
            "bytes_per_token": bytes_per_token(model),
        },
        "read_bytes_per_s": bandwidth,
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.json == "-":
        sys.stderr.write(table(report, rows))
        sys.stdout.write(text)
        return 0
    sys.stdout.write(table(report, rows))
    if options.json is not None:
        try:
            Path(options.json).write_text(text)
        except OSError as error:
            sys.stderr.write(f"error: cannot write {options.json}: {error.strerror}\n")
            return 2
    return 0


def table(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """The report for people."""
    machine, model = report["machine"], report["model"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {format_bytes(machine['memory_bytes'])}; "
        f"kernels {machine['kernels'][-1]}",
        f"{model['file']}: {model['parameters'] / 1e6:.1f} M parameters, {model['file_type']}, "
        f"{format_bytes(model['file_bytes'])}; {format_bytes(model['bytes_per_token'])} of weights per token",
        f"medians of {len(rows[0].decode_tokens_per_s.runs)} interleaved runs (least-most); prompt "
        f"{rows[0].prompt_tokens} tokens, answer {rows[0].decode_tokens} tokens",
        "",
        f"{'engine':<12} {'threads':>7} {'prompt tok/s':>26} {'decode tok/s':>26} {'first token':>12} "
        f"{'peak memory':>12} {'of bandwidth':>13}",
    ]
    for row in rows:
        used = row.decode_tokens_per_s.median * model["bytes_per_token"]
        share = used / report["read_bytes_per_s"][str(row.threads)]
        lines.append(
            f"{row.engine:<12} {row.threads:>7} {row.prompt_tokens_per_s!s:>26} {row.decode_tokens_per_s!s:>26} "
            f"{row.first_token_s.median * 1e3:>9.1f} ms {format_bytes(row.peak_rss_bytes):>12} {share:>13.0%}"
        )
    speeds = ", ".join(
        f"{speed / 1e9:.1f} GB/s with {count} thread{'s' if count != '1' else ''}"
        for count, speed in report["read_bytes_per_s"].items()
    )
    lines += ["", f"memory read bandwidth: {speeds}", "versions: " + _joined(report["versions"])]
    return "\n".join(lines) + "\n"


def _joined(items: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in items.items())


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
