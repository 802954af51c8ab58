"""The benchmark's options, and its parts that can be checked without a peer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from runtime_cpu import _core, bench_machine, bench_worker, synth
from runtime_cpu.bench import BenchError, Plan, bench
from runtime_cpu.bench_machine import (
    MachineError,
    MemoryCgroup,
    busy_cpu_s,
    contention,
    disk_rate,
    drop_cached,
    measure_bandwidth,
    process_cpu_s,
)
from runtime_cpu.bench_report import ReportError, Row, Spread, plot, ratios, table
from runtime_cpu.bench_worker import PEER_MODULE, OurEngine
from runtime_cpu.traffic import kv_bytes, weight_bytes
from tests.runtime_cpu.servers import MODEL
from tests.waiting import CEILING_S, wait_for


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime_cpu.bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=CEILING_S)


def spread(*values: float) -> Spread:
    return Spread.of(values)


def row(engine: str, prompt: Spread, decode: Spread | None) -> Row:
    return Row(engine, 2, 8, 4, 0, prompt, decode, spread(0.1, 0.2), 1 << 20)


def test_every_option_at_once(tmp_path: Path) -> None:
    done = run(
        MODEL,
        *("--runs", 2, "--prompt", 16, "--decode", 4, "--threads", 1, "--depth", 40, "--contend"),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    (only,) = report["rows"]
    assert only["depth"] == 40 and len(only["decode_tokens_per_s"]["runs"]) == 2
    assert 0 < only["active_neuron_share"] < 1
    model = _core.Model.open(str(MODEL))
    # Q8_0 experts are read whole, and the answer begins after depth and prompt.
    assert only["weight_bytes_per_token"] == weight_bytes(model) == report["model"]["bytes_per_token"]
    assert only["kv_bytes_per_token"] == kv_bytes(model, 40 + 16 + 2, "f16") and only["kv_type"] == "f16"
    assert (only["head"], only["head_row_share"]) == ("exact", 1.0)
    assert "answer 4 tokens after 56" in done.stdout
    assert only["others_cores"]["low"] >= 0
    assert report["bandwidth"]["before"].keys() == report["bandwidth"]["after"].keys() == {"1"}
    assert report["read_bytes_per_s"]["1"] == max(
        report["bandwidth"][when]["1"] for when in ("before", "after")
    )
    small = {"unavailable": "the file is too small to tell"}
    assert report["disk"] == {"before": small, "after": small}
    assert report["contended"] and "burned one core" in done.stdout and "tokens after 40" in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_only_what_is_read_counts(tmp_path: Path) -> None:
    shape = synth.Shape("m", 12, 512, 4, 2, 64, 32, 4, 96, 4096, 1024, 0, False, True)
    path = tmp_path / "m.gguf"
    synth.write(path, shape, head_share=0.1)
    done = run(
        *(path, "--runs", 1, "--prompt", 24, "--decode", 12, "--threads", 1, "--kv", "q8", "--json", "-"),
        *("--head", "predictor"),
    )
    assert done.returncode == 0, done.stderr
    (predicted,) = json.loads(done.stdout)["rows"]
    ((exact,), _, _) = bench(Plan(path, [1], 1, 24, 12, kv_type="q8"))
    model = _core.Model.open(str(path))
    for row, head in ((asdict(exact), "exact"), (predicted, "predictor")):
        share = row["head_row_share"]
        assert row["head"] == head and row["kv_type"] == "q8"
        assert (share == 1) if head == "exact" else (0.05 < share < 0.15)
        assert 0.2 < row["active_neuron_share"] < 0.5
        named = share if head == "predictor" else None
        assert row["weight_bytes_per_token"] == weight_bytes(model, 1 - row["active_neuron_share"], named)
        assert row["kv_bytes_per_token"] == kv_bytes(model, 24 + 6, "q8")
    sizes = {name: size for name, _, _, _, size in model.tensors()}
    saved = sizes["token_embd.weight"] - sum(size for name, size in sizes.items() if "predictor" in name)
    assert exact.weight_bytes_per_token is not None and exact.weight_bytes_per_token < weight_bytes(model)
    assert 0.7 * saved < exact.weight_bytes_per_token - predicted["weight_bytes_per_token"] < saved
    assert f"{predicted['head_row_share']:.1%} of the output rows were computed" in done.stderr
    with pytest.raises(BenchError, match="has no predictor of its head's rows"):
        bench(Plan(MODEL, [1], 1, 8, 2, head="predictor"))


def test_prompts_only(tmp_path: Path) -> None:
    done = run(
        MODEL, "--prompt-only", "--text-like", "--runs", 1, "--prompt", 16, "--threads", 1, "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    (only,) = json.loads(done.stdout)["rows"]
    assert only["decode_tokens_per_s"] is None and only["decode_tokens"] == 0


def test_a_memory_limit_reaches_the_engine_and_the_kernel() -> None:
    rows, _, notes = bench(Plan(MODEL, [1], 1, 8, 2, memory_bytes=400 << 20))
    if notes:
        assert "not enforced by the kernel" in notes[0]
    else:
        assert rows[0].cgroup_peak_bytes is not None and rows[0].cgroup_peak_bytes <= 400 << 20
    done = run(MODEL, "--memory", "1MiB", "--runs", 1)
    # Whoever comes first: the engine's plan, or the kernel that does not even let Python start.
    assert done.returncode == 2 and ("memory is 1.00 MiB" in done.stderr or "out of memory" in done.stderr)
    assert done.stderr.count("\n") == 1


def test_the_kernel_kills_what_exceeds_its_group(tmp_path: Path) -> None:
    try:
        group = MemoryCgroup(64 << 20, f"smallthinker-test-{os.getpid()}")
    except MachineError as error:
        pytest.skip(str(error))
    try:
        child = subprocess.run(
            [sys.executable, "-c", "x = bytearray(200 << 20)"], preexec_fn=group.enter, check=False
        )
        assert child.returncode == -9
        assert (group.peak_bytes() or 0) >= 60 << 20
    finally:
        group.remove()
    assert not group._folder.exists()


def test_depth_changes_what_is_attended_to_and_is_computed_once() -> None:
    engine = OurEngine(str(MODEL), 1, 200, None)
    random = np.random.default_rng(0)
    before, prompt, other = (
        random.integers(0, engine.vocab_size, count).astype(np.int32) for count in (100, 8, 8)
    )
    engine.measure(before, prompt, 2)
    assert engine._engine.stats.reused_tokens == 100
    engine.measure(before, other, 2)
    assert engine._engine.stats.reused_tokens == 100
    times = engine.measure(np.empty(0, np.int32), prompt, 0)
    assert times["decode_s"] == 0 < times["prompt_s"] <= times["first_token_s"]


def test_ratios_pair_the_rounds() -> None:
    mine = replace(
        row("runtime_cpu", spread(10, 40), spread(2, 4)),
        weight_bytes_per_token=900_000_000,
        kv_bytes_per_token=100_000_000,
        cache_hit_rate=spread(0.5, 0.7),
        bytes_read_per_token=spread(10e6, 20e6),
    )
    other = row(PEER_MODULE, spread(5, 10), spread(1, 1))
    (ratio,) = ratios([mine, other], "runtime_cpu", PEER_MODULE)
    assert ratio.prompt == spread(2, 4) and ratio.decode == spread(2, 4)
    (ratio,) = ratios([mine, row(PEER_MODULE, spread(5, 10), None)], "runtime_cpu", PEER_MODULE)
    assert ratio.decode is None
    report = {
        "machine": {"cpu": "cpu", "cores": 2, "memory_bytes": 1 << 30, "kernels": ["avx2"]},
        "model": {
            "file": "m.gguf",
            "parameters": 1,
            "file_type": "Q4_0",
            "file_bytes": 1,
            "bytes_per_token": 1e9,
        },
        "read_bytes_per_s": {"2": 10e9},
        "bandwidth": {"before": {"2": 10e9}, "after": {"2": 9e9}},
        "disk": {"before": {"read_bytes_per_s": 1e9}, "after": {"read_bytes_per_s": 2e9}},
        "versions": {},
        "notes": ["the peer died"],
    }
    shown = table(report, [mine, other], ratios([mine, other], "runtime_cpu", PEER_MODULE))
    assert "prompt 3.00 (2.00-4.00), decode 3.00 (2.00-4.00)" in shown
    assert "1000.0           30%" in shown  # 3 tokens/s of a GB at 10 GB/s
    assert (
        "60.0% of experts found in memory; decoding read 15.0 MB per token (10.0-20.0, mean 15.0), 50 MB/s"
        in shown
    )
    assert (
        "10.0, 9.0" in shown
        and "note: the peer died" in shown
        and "1000 MB/s before and 2000 MB/s after" in shown
    )


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match="pip install matplotlib"):
        plot({}, [], tmp_path / "a.png")


def test_the_report_reaches_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "runtime_cpu.bench", str(MODEL), "--runs", "1", "--prompt", "8"),
            *("--decode", "2", "--threads", "1", "--mlflow", "speed"),
        ],
        env={**os.environ, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(Path.cwd())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=CEILING_S,
    )
    assert done.returncode == 0, done.stderr
    import mlflow

    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("speed")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["runtime_cpu/1_threads/decode_tokens_per_s"] > 0


def test_the_workers_file_runs_without_our_package(tmp_path: Path) -> None:
    """The peer's environment has numpy and llama_cpp; the folder of the file shadows the standard library."""
    program = (
        "import runpy, sys\n"
        "sys.modules['runtime_cpu'] = None\n"
        f"sys.argv = ['x', 'versions']\nrunpy.run_path({bench_worker.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "numpy" in json.loads(done.stdout), done.stderr
    done = subprocess.run(
        [sys.executable, "-I", bench_worker.__file__, "versions"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", -1], "--depth is -1"),
        (["--depth", 100_000], "do not fit"),
        (["--memory", "lots"], "memory is 'lots'"),
        (["--peer", "--peer-python", "/no/python"], "cannot be run"),
        (["--peer", "--peer-python", "/bin/false"], "fails"),
    ],
)
def test_wrong_options_are_named(arguments: list[object], message: str) -> None:
    done = run(MODEL, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


class Seconds:
    """A clock on which a second passes between any two looks."""

    def __init__(self) -> None:
        self.looks = 0

    def perf_counter(self) -> float:
        self.looks += 1
        return float(self.looks)


def test_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(bench_machine, "time", Seconds())
        rate = measure_bandwidth(1)  # what was read in one second: nearly all of the halves of an array
        assert rate == rate // 8 * 8 and 1 << 20 < rate <= psutil.virtual_memory().total / 8
    big = tmp_path / "big"
    big.write_bytes(bytes(80 << 20))
    read = disk_rate(big)
    if "unavailable" in read:
        assert "O_DIRECT" in read["unavailable"]
    else:  # whole blocks, as many as came before the time for it was over
        assert 0 < read["bytes"] <= 80 << 20 and read["bytes"] % (8 << 20) == 0
        assert read["read_bytes_per_s"] > 0
    drop_cached(big)


def test_a_burning_process_shows_and_is_not_ours() -> None:
    """In seconds of processor time, which pass only while somebody computes."""
    busy, own = busy_cpu_s(), process_cpu_s(os.getpid())
    if busy is None or own is None:
        pytest.skip("the system does not tell")
    before = set(psutil.Process().children())
    with contention(True):
        (burner,) = set(psutil.Process().children()) - before
        # time is the subject: a processor's, which passes however busy the machine is
        wait_for(lambda: (process_cpu_s(burner.pid) or 0) > 0.5, "half a second of burning")
        busy_after, own_after = busy_cpu_s(), process_cpu_s(os.getpid())
    assert busy_after is not None and busy_after - busy > 0.3, "the burning process does not show"
    assert own_after is not None and own_after - own < 0.5, "the burning process counts as ours"
    assert not burner.is_running()
