"""The commands chat, bench, perplexity and logits, run as their users run them."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime_cpu import Engine
from runtime_cpu.bench import Spread
from runtime_cpu.bench_worker import versions
from runtime_cpu.perplexity import measure, read_tokens, surprise
from runtime_cpu.traffic import weight_bytes
from tests.runtime_cpu.servers import GOLDEN, MODEL
from tests.waiting import CEILING_S, wait_for

EXACT = np.load(GOLDEN / "tiny-4b-f32.npz")


def run(module: str, *arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"runtime_cpu.{module}", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=CEILING_S,
    )


def test_perplexity_equals_that_of_the_exact_logits() -> None:
    """Against fp64 logits that were computed from the file's weights by another program."""
    ids, rows = EXACT["input_ids"], EXACT["logits_exact"].astype(np.float64)
    log_sum = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    expected = np.mean(log_sum[:-1] - rows[np.arange(len(ids) - 1), ids[1:]])
    with Engine.open(GOLDEN / "tiny-4b-f32.gguf", threads=1, context=256) as engine:
        result = measure(engine, ids, window=len(ids))
    assert result.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert (result.tokens, result.windows) == (len(ids) - 1, 1)


def test_windows_do_not_see_each_other() -> None:
    with Engine.open(MODEL, threads=1, context=256) as engine:
        ids = engine.tokenizer.encode("the hat in the ton on an anther " * 8)[:100]
        parts = [measure(engine, ids[start : start + 32]) for start in (0, 32, 64)]
        whole = measure(engine, ids[:97], window=32)  # a last window of one token predicts nothing
        assert whole.windows == 3 and whole.tokens == 93
        assert whole.nats_per_token == pytest.approx(np.mean([part.nats_per_token for part in parts]))
        assert whole.bytes == sum(part.bytes for part in parts)
        assert whole.bits_per_byte == pytest.approx(
            whole.nats_per_token * whole.tokens / whole.bytes / math.log(2)
        )
        for window in (1, 257):
            with pytest.raises(ValueError, match="window is"):
                measure(engine, ids, window)
        with pytest.raises(ValueError, match="at least 2"):
            measure(engine, [1])


def test_surprise_survives_extreme_logits() -> None:
    logits = np.array([[1e30, -1e30], [0, 0]], np.float32)
    assert surprise(logits, np.array([0, 1])).tolist() == [0.0, pytest.approx(math.log(2))]


def test_tokens_are_read_from_text_ds_and_npy(tmp_path: Path) -> None:
    with Engine.open(MODEL, threads=1, context=256) as engine:
        tokenizer = engine.tokenizer
    ids = tokenizer.encode("the hat <|im_end|>")
    (tmp_path / "a.txt").write_text("the hat <|im_end|>")
    np.array(ids, "<u2").tofile(tmp_path / "a.ds")
    np.save(tmp_path / "a.npy", np.array(ids))
    for name in ("a.txt", "a.ds", "a.npy"):
        assert read_tokens(tmp_path / name, tokenizer).tolist() == ids
    (tmp_path / "torn.ds").write_bytes(b"abc")
    (tmp_path / "large.ds").write_bytes(b"\xff\xff")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    np.save(tmp_path / "float.npy", np.ones(3))
    for name, message in (
        ("torn.ds", "is cut"),
        ("large.ds", "outside"),
        ("binary", "UTF-8"),
        ("float.npy", "list of ids"),
    ):
        with pytest.raises(ValueError, match=message):
            read_tokens(tmp_path / name, tokenizer)


def test_the_perplexity_command(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the hat in the ton " * 20)
    done = run("perplexity", MODEL, tmp_path / "text", "--window", 64, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))
    for arguments in (
        [MODEL, tmp_path / "nothing"],
        [tmp_path / "text", tmp_path / "text"],
        [MODEL, tmp_path / "text", "--window", 1],
    ):
        done = run("perplexity", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_logits_command(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", EXACT["input_ids"])
    done = run("logits", GOLDEN / "tiny-4b-f32.gguf", tmp_path / "ids.npy", tmp_path / "out.npy")
    assert done.returncode == 0, done.stderr
    rows, exact = np.load(tmp_path / "out.npy"), EXACT["logits_exact"]
    assert rows.dtype == np.float32
    assert float(np.max(np.linalg.norm(rows - exact, axis=1) / np.linalg.norm(exact, axis=1))) < 1e-5


def test_bench_reports_everything(tmp_path: Path) -> None:
    done = run(
        "bench",
        MODEL,
        "--runs",
        2,
        "--prompt",
        32,
        "--decode",
        8,
        "--threads",
        "1,2",
        "--json",
        tmp_path / "out.json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["threads"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert len(row["decode_tokens_per_s"]["runs"]) == 2
        assert row["decode_tokens_per_s"]["low"] > 0 and row["prompt_tokens_per_s"]["low"] > 0
        assert row["first_token_s"]["median"] > 0
        assert 20 << 20 < row["peak_rss_bytes"] < 300 << 20
    assert report["machine"]["cores"] >= 1 and report["machine"]["memory_bytes"] > 1 << 28
    assert all(speed > 0 for speed in report["read_bytes_per_s"].values())
    assert report["model"]["file_type"] == "Q8_0"
    assert "decode tok/s" in done.stdout and MODEL.name in done.stdout


def test_peak_memory_is_the_childs_own(tmp_path: Path) -> None:
    """Linux carries a parent's peak over exec in getrusage; a fat parent must not show in the report."""
    program = (
        "import numpy, subprocess, sys\nfat = numpy.ones(100_000_000)\n"
        "sys.exit(subprocess.run([sys.executable, '-m', 'runtime_cpu.bench', *sys.argv[1:]]).returncode)"
    )
    arguments = [str(MODEL), "--runs", "1", "--prompt", "8", "--decode", "2", "--threads", "1", "--json"]
    command = [sys.executable, "-c", program, *arguments, str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=CEILING_S)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["rows"][0]["peak_rss_bytes"] < 300 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.gguf"], "no model file at nothing.gguf"),
        ([__file__], "GGUF"),
        ([MODEL, "--runs", "0"], "--runs is 0"),
        ([MODEL, "--threads", "1,x"], "--threads is '1,x'"),
        ([MODEL, "--prompt", "20000"], "do not fit"),
    ],
)
def test_bench_names_what_is_wrong(arguments: list[object], message: str) -> None:
    done = run("bench", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif("llama_cpp" in versions(), reason="the peer is installed")
def test_a_missing_peer_is_named() -> None:
    done = run("bench", MODEL, "--peer")
    assert done.returncode == 2 and "llama-cpp-python" in done.stderr


def test_spread_and_bytes_per_token() -> None:
    from runtime_cpu import _core

    spread = Spread.of([3.0, 1.0, 2.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)
    model = _core.Model.open(str(MODEL))
    tensors = {name: size for name, _, _, _, size in model.tensors()}
    experts = sum(size for name, size in tensors.items() if "_exps." in name)
    assert weight_bytes(model) == sum(tensors.values()) - experts + experts * 2 // 8


def test_chat_obeys_its_commands() -> None:
    done = run(
        "chat",
        MODEL,
        "--max-tokens",
        5,
        "--seed",
        1,
        text="/stats\nthe hat\n/stats\n/reset\n/what\nthe hat\n/quit\nno\n",
    )
    assert done.returncode == 0, done.stderr
    assert "no answer yet" in done.stderr and "answer 5 tokens" in done.stderr
    assert "a new conversation" in done.stderr and "/reset  forget" in done.stderr
    first, second = done.stdout.encode().split(b"\n")[0], done.stdout.encode()
    assert second.count(first) >= 2 or first == b"", "a reset conversation begins anew"


def test_chat_says_when_the_context_is_full() -> None:
    done = run("chat", MODEL, "--context", 64, "--max-tokens", 5, text="x" * 100 + "\nthe hat\n")
    assert done.returncode == 0 and "/reset begins a new one" in done.stderr
    for arguments in (["nothing.gguf"], [MODEL, "--temperature", "-1"], [MODEL, "--memory", "1KiB"]):
        done = run("chat", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on() -> None:
    controller, terminal = pty.openpty()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.runtime_cpu.endless", "runtime_cpu.chat"),
                *(str(MODEL), "--temperature", "2", "--seed", "5"),
            ],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    os.close(terminal)
    shown = b""

    def read_until(found: Callable[[], bool]) -> None:
        nonlocal shown

        def read_and_look() -> bool:
            nonlocal shown
            assert child.poll() is None, shown[-500:]
            if select.select([controller], [], [], 1)[0]:
                shown += os.read(controller, 65536)
            return found()

        wait_for(read_and_look, "the terminal to show it")

    def say(line: bytes) -> None:
        nonlocal shown
        shown = b""
        os.write(controller, line + b"\n")

    try:
        read_until(lambda: b"> " in shown)
        say(b"the hat")
        read_until(lambda: len(shown.partition(b"\n")[2]) > 20)  # the echo, and then some of the answer
        child.send_signal(signal.SIGINT)
        read_until(lambda: shown.endswith(b"> "))
        say(b"/stats")
        read_until(lambda: b"peak memory" in shown and shown.endswith(b"> "))
        assert b"cancelled" in shown
        say(b"/quit")
        assert child.wait(timeout=CEILING_S) == 0
    finally:
        child.kill()
        child.wait()
        os.close(controller)


def test_the_engine_stands_alone() -> None:
    """An edge box has neither torch nor the pipeline: no command may import them."""
    program = (
        "import sys\n"
        "import runtime_cpu.serve.__main__, runtime_cpu.chat, runtime_cpu.bench\n"
        "import runtime_cpu.perplexity, runtime_cpu.logits\n"
        "bad = {'torch', 'transformers', 'pydantic', 'model', 'components', 'flows', 'gguf'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=CEILING_S)
    assert done.returncode == 0, done.stderr
