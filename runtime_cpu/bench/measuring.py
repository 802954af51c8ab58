"""Measuring every combination of engine and thread count in processes of their own: ``bench(workload)``.

The runs are interleaved (every combination once, then again), so that a busy moment of the machine hits all alike.
llama.cpp is measured through the package llama-cpp-python, in this environment or in that of another interpreter. With
a memory limit every process gets a memory cgroup of that size where one can be made, and llama.cpp runs without
repacking: its repacked copy of the weights would not fit where the mapped file does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import fmean
from typing import Any

from runtime_cpu import _core
from runtime_cpu.bench.machine import MachineError, MemoryCgroup, drop_cached
from runtime_cpu.bench.process import MeasuringProcess
from runtime_cpu.bench.report import Row, Spread
from runtime_cpu.bench.worker import PEER_MODULE
from runtime_cpu.bench.workload import BenchError, Workload
from runtime_cpu.memory.plan import format_bytes
from runtime_cpu.memory.traffic import kv_bytes, skips_silent_neurons, weight_bytes


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
    workers: list[MeasuringProcess] = []
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
                    worker = MeasuringProcess(workload, engine, threads, group)
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


def _row(workload: Workload, worker: MeasuringProcess, measured: Sequence[dict[str, Any]]) -> Row:
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
