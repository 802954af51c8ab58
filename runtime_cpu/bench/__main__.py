"""The command ``python -m runtime_cpu.bench MODEL [--json OUT] [--peer]``: speed and memory on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from runtime_cpu import _core
from runtime_cpu.bench.machine import MachineError, contention, describe_machine, disk_rate, read_bandwidth
from runtime_cpu.bench.measuring import bench
from runtime_cpu.bench.process import require_peer
from runtime_cpu.bench.report import ReportError, log_to_mlflow, plot, ratios, table
from runtime_cpu.bench.worker import PEER_MODULE, versions
from runtime_cpu.bench.workload import OURS, BenchError, Workload
from runtime_cpu.console import add_kv_option, show_progress
from runtime_cpu.engine.head_predictor import HEADS
from runtime_cpu.engine.options import available_cores, model_file
from runtime_cpu.memory.plan import parse_bytes
from runtime_cpu.memory.traffic import weight_bytes

_FORMAT_VERSION = 2


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the model or an option is unusable."""
    options = _parser().parse_args(arguments)
    try:
        workload = _workload(options)
        model = _core.Model.open(str(workload.model))
        if workload.context > model.context_length:
            raise BenchError(
                f"--prompt {workload.prompt_tokens}, --decode {workload.decode_tokens} and --depth {workload.depth} "
                f"do not fit into the model's context of {model.context_length} tokens"
            )
        if PEER_MODULE in workload.engines:
            require_peer(workload.peer_python)
        show_progress("memory and disk")
        before = read_bandwidth(workload.thread_counts)
        disk = {"before": disk_rate(workload.model)}
        with contention(options.contend):
            rows, found, notes = bench(workload, show_progress)
        show_progress("memory and disk")
        after = read_bandwidth(workload.thread_counts)
        disk["after"] = disk_rate(workload.model)
        show_progress("")
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
                "file": workload.model.name,
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
    except (OSError, ValueError, _core.EngineError, BenchError, MachineError, ReportError) as error:
        show_progress("")
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


def _workload(options: argparse.Namespace) -> Workload:
    for name, least in (("runs", 1), ("prompt", 1), ("decode", 1), ("depth", 0)):
        if getattr(options, name) < least:
            raise BenchError(f"--{name} is {getattr(options, name)}; allowed is {least} and more")
    for model in (options.model, options.peer_model or options.model):
        model_file(model)
    peer = [PEER_MODULE] if options.peer or options.peer_only else []
    return Workload(
        model=options.model,
        thread_counts=_thread_counts(options.threads),
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


def _thread_counts(text: str | None) -> list[int]:
    if text is None:
        return sorted({1, available_cores()})
    counts = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if not all(1 <= count <= 256 for count in counts):
        raise BenchError(f"--threads is {text!r}; write numbers from 1 to 256 with commas between")
    return sorted(set(counts))


if __name__ == "__main__":
    sys.exit(main())
