"""What :mod:`runtime_cpu.bench` measured, for people: rows, the table, a plot, a run in MLflow."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import mul
from pathlib import Path
from statistics import fmean, median
from typing import Any

from runtime_cpu.memory.plan import format_bytes

_BUSY_CORES = 0.15  # from here on, a run was not alone


class ReportError(Exception):
    """A report could not be made; the message says what to install."""


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
    """One combination's outcome.

    Attributes:
        engine: ``runtime_cpu`` or ``llama_cpp``.
        depth: tokens that were in the context before the prompt.
        decode_tokens_per_s: ``None`` when only prompts were measured.
        first_token_s: from a prompt of ``prompt_tokens`` to the first token.
        memory_bytes: the limit, if there was one; ``cgroup_peak_bytes``: the most that its cgroup was charged.
        active_neuron_share: of our engine's experts, mean over the runs, prompt and answer.
        kv_type: how keys and values are kept.
        head: ``exact`` or ``predictor``, of our engine; ``head_row_share``: share of the output rows that it computed.
        weight_bytes_per_token, kv_bytes_per_token: what computing a token of the answer reads: without silent neurons
            where they are skipped, and without rows of the head that are not named; keys and values in the middle
            of the answer.
        cache_hit_rate, bytes_read_per_token: of an engine whose experts are on disk: experts that needed no read, and
            bytes that each decoded token read.
        others_cores: cores that other processes kept busy during each run, on average.
    """

    engine: str
    threads: int
    prompt_tokens: int
    decode_tokens: int
    depth: int
    prompt_tokens_per_s: Spread
    decode_tokens_per_s: Spread | None
    first_token_s: Spread
    peak_rss_bytes: int
    memory_bytes: int | None = None
    cgroup_peak_bytes: int | None = None
    active_neuron_share: float | None = None
    kv_type: str | None = None
    head: str | None = None
    head_row_share: float | None = None
    weight_bytes_per_token: int | None = None
    kv_bytes_per_token: int | None = None
    cache_hit_rate: Spread | None = None
    bytes_read_per_token: Spread | None = None
    others_cores: Spread | None = None


@dataclass(frozen=True)
class Ratio:
    """Our speed over the peer's with as many threads: per round, so that a busy moment hits both sides alike."""

    threads: int
    prompt: Spread
    decode: Spread | None


def ratios(rows: Sequence[Row], ours: str, peer: str) -> list[Ratio]:
    """One ratio for every number of threads that both engines ran."""
    found = []
    for mine in (row for row in rows if row.engine == ours):
        for other in (row for row in rows if row.engine == peer and row.threads == mine.threads):
            decode = None
            if mine.decode_tokens_per_s is not None and other.decode_tokens_per_s is not None:
                decode = _divided(mine.decode_tokens_per_s, other.decode_tokens_per_s)
            prompt = _divided(mine.prompt_tokens_per_s, other.prompt_tokens_per_s)
            found.append(Ratio(mine.threads, prompt, decode))
    return found


def _divided(mine: Spread, other: Spread) -> Spread:
    return Spread.of(a / b for a, b in zip(mine.runs, other.runs, strict=True))


def table(report: Mapping[str, Any], rows: Sequence[Row], compared: Sequence[Ratio] = ()) -> str:
    """The report for people."""
    machine, model = report["machine"], report["model"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {format_bytes(machine['memory_bytes'])}; "
        f"kernels {machine['kernels'][-1]}",
        f"{model['file']}: {model['parameters'] / 1e6:.1f} M parameters, {model['file_type']}, "
        f"{format_bytes(model['file_bytes'])}; {format_bytes(model['bytes_per_token'])} of weights per token "
        "when every neuron is read",
    ]
    if rows:
        first = rows[0]
        lines += [
            f"medians of {len(first.prompt_tokens_per_s.runs)} interleaved runs (least-most); prompt "
            f"{first.prompt_tokens} tokens after {first.depth}, answer {first.decode_tokens} tokens after "
            f"{first.depth + first.prompt_tokens}",
            "",
            f"{'engine':<12} {'threads':>7} {'prompt tok/s':>26} {'decode tok/s':>26} {'first token':>12} "
            f"{'peak memory':>12} {'MB/token':>9} {'of bandwidth':>13} {'GB/s before, after':>19}",
        ]
    for row in rows:
        share, decode, read = "-", "-", "-"
        if row.decode_tokens_per_s is not None:
            decode = str(row.decode_tokens_per_s)
            if row.weight_bytes_per_token is not None and row.kv_bytes_per_token is not None:
                size = row.weight_bytes_per_token + row.kv_bytes_per_token
                used = row.decode_tokens_per_s.median * size
                share = f"{used / report['read_bytes_per_s'][str(row.threads)]:.0%}"
                read = f"{size / 1e6:.1f}"
        around = ", ".join(
            f"{report['bandwidth'][when][str(row.threads)] / 1e9:.1f}" for when in ("before", "after")
        )
        lines.append(
            f"{row.engine:<12} {row.threads:>7} {row.prompt_tokens_per_s!s:>26} {decode:>26} "
            f"{row.first_token_s.median * 1e3:>9.1f} ms {format_bytes(row.peak_rss_bytes):>12} {read:>9} {share:>13} "
            f"{around:>19}"
        )
        if row.head == "predictor" and row.head_row_share is not None:
            lines.append(
                f"{'':<20} predicted head: {row.head_row_share:.1%} of the output rows were computed"
            )
        if row.cgroup_peak_bytes is not None and row.memory_bytes is not None:
            lines.append(
                f"{'':<20} in a cgroup of {format_bytes(row.memory_bytes)}, of which at most "
                f"{format_bytes(row.cgroup_peak_bytes)} were charged"
            )
        if row.bytes_read_per_token is not None and row.cache_hit_rate is not None:
            each = row.bytes_read_per_token
            rate = ""
            if row.decode_tokens_per_s is not None:
                rate = f", {fmean(map(mul, each.runs, row.decode_tokens_per_s.runs)) / 1e6:.0f} MB/s"
            lines.append(
                f"{'':<20} {row.cache_hit_rate.median:.1%} of experts found in memory; decoding read "
                f"{each.median / 1e6:.1f} MB per token ({each.low / 1e6:.1f}-{each.high / 1e6:.1f}, mean "
                f"{fmean(each.runs) / 1e6:.1f}){rate}"
            )
        if row.others_cores is not None and row.others_cores.high >= _BUSY_CORES:
            runs = ", ".join(f"{cores:.1f}" for cores in row.others_cores.runs)
            lines.append(f"{'':<20} other processes kept cores busy: {runs} by run")
    for ratio in compared:
        decode = "" if ratio.decode is None else f", decode {_times(ratio.decode)}"
        lines.append(
            f"runtime_cpu over the peer, {ratio.threads} threads: prompt {_times(ratio.prompt)}{decode}"
        )
    lines += ["", *(f"note: {note}" for note in report["notes"])]
    speeds = ", ".join(
        f"{speed / 1e9:.1f} GB/s with {count} thread{'s' if count != '1' else ''}"
        for count, speed in report["read_bytes_per_s"].items()
    )
    disk = " and ".join(
        f"{found['read_bytes_per_s'] / 1e6:.0f} MB/s {when}"
        for when, found in report["disk"].items()
        if "read_bytes_per_s" in found
    )
    disk = disk or report["disk"]["before"]["unavailable"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [f"memory read bandwidth: {speeds}; disk: {disk}", f"versions: {versions}"]
    return "\n".join(lines) + "\n"


def _times(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def plot(report: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Bars of prompt and decoding speed with their spreads, one per engine and number of threads.

    Raises:
        ReportError: matplotlib is missing, or the file name's ending is no picture's.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ReportError("--plot needs the package matplotlib: pip install matplotlib") from error
    labels = [f"{row.engine}\n{row.threads} thread{'s' if row.threads > 1 else ''}" for row in rows]
    colours = ["#2a6f97" if row.engine == "runtime_cpu" else "#b5b5b5" for row in rows]
    panels = [("Prompt", [row.prompt_tokens_per_s for row in rows])]
    decode = [row.decode_tokens_per_s for row in rows if row.decode_tokens_per_s is not None]
    if decode:
        panels.append(("Decoding", decode))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1.5 + 2.2 * len(rows), 3.6), squeeze=False)
    for axis, (title, spreads) in zip(axes[0], panels, strict=True):
        middle = [spread.median for spread in spreads]
        below = [spread.median - spread.low for spread in spreads]
        above = [spread.high - spread.median for spread in spreads]
        bars = axis.bar(labels, middle, yerr=[below, above], color=colours, capsize=4)
        axis.bar_label(bars, fmt="%.1f", padding=3)  # above the spread
        axis.set_title(f"{title}, tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    figure.suptitle(f"{report['model']['file']} on {machine['cpu']}, {machine['cores']} cores", fontsize=10)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ReportError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)


def log_to_mlflow(report: Mapping[str, Any], rows: Sequence[Row], experiment: str) -> None:
    """One run with the medians as metrics and the whole report as ``bench.json``; the server as MLflow is set up.

    Raises:
        ReportError: the package mlflow is missing, or its server refused.
    """
    try:
        mlflow: Any = importlib.import_module("mlflow")
    except ImportError as error:
        raise ReportError("--mlflow needs the package mlflow: pip install mlflow") from error
    metrics: dict[str, float] = {}
    for row in rows:
        prefix = f"{row.engine}/{row.threads}_threads"
        metrics[f"{prefix}/prompt_tokens_per_s"] = row.prompt_tokens_per_s.median
        metrics[f"{prefix}/first_token_s"] = row.first_token_s.median
        metrics[f"{prefix}/peak_rss_bytes"] = row.peak_rss_bytes
        if row.decode_tokens_per_s is not None:
            metrics[f"{prefix}/decode_tokens_per_s"] = row.decode_tokens_per_s.median
    for count, speed in report["read_bytes_per_s"].items():
        metrics[f"machine/read_bytes_per_s_{count}_threads"] = speed
    first = asdict(rows[0])
    settings = {key: first[key] for key in ("prompt_tokens", "decode_tokens", "depth", "memory_bytes")}
    try:
        mlflow.set_experiment(experiment)
        with mlflow.start_run(run_name=report["model"]["file"]):
            mlflow.log_params({"file": report["model"]["file"], "cpu": report["machine"]["cpu"], **settings})
            mlflow.log_metrics(metrics)
            mlflow.log_dict(dict(report), "bench.json")
    except mlflow.exceptions.MlflowException as error:
        raise ReportError(f"MLflow refused the report: {error}") from error
