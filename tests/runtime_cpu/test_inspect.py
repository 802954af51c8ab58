"""What inspect says about files, against what the engine does with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_cpu import Engine, MemoryBudgetError, _core, synth
from runtime_cpu.inspect import inspect, table
from runtime_cpu.memory import release_free_memory
from runtime_cpu.pack import pack
from runtime_cpu.traffic import kv_bytes, skips_silent_neurons, weight_bytes
from tests.runtime_cpu.servers import GOLDEN, MODEL
from tests.runtime_cpu.small_models import Shape, random_weights, write_model
from tests.waiting import CEILING_S


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime_cpu.inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=CEILING_S)


def test_it_shows_the_model_that_the_engine_opens() -> None:
    report = inspect(MODEL)
    with Engine.open(MODEL, threads=1) as engine:
        for name in (
            "layers",
            "hidden",
            "experts",
            "experts_per_token",
            "window",
            "router",
            "tied_embeddings",
        ):
            assert report["model"][name] == getattr(engine.info, name)
        assert tuple(report["model"]["rope_layout"]) == engine.info.rope_layout
        plan = engine.info.plan
        assert report["memory"]["parts"]["kv_bytes"] == plan.kv_bytes
        assert report["memory"]["sessions"] == engine.info.sessions
        assert report["tokenizer"]["control_tokens"] == engine.tokenizer.control_tokens
        assert report["tokenizer"]["tokens"] == engine.info.vocab_size
    model = _core.Model.open(str(MODEL))
    for group in report["tensors"].values():
        assert sum(entry["bytes"] for entry in group.values()) == sum(size for *_, size in model.tensors())
        assert sum(entry["tensors"] for entry in group.values()) == len(model.tensors())
    assert report["file"]["layout"] == "stock"


def test_the_smallest_budget_is_enough_and_less_is_not() -> None:
    release_free_memory()  # opening does it too: what other tests have left would count for one side only
    smallest = inspect(MODEL)["memory"]["smallest_budget_bytes"]
    with pytest.raises(MemoryBudgetError):
        Engine.open(MODEL, threads=1, memory=smallest - (16 << 20))
    Engine.open(MODEL, threads=1, memory=smallest + (16 << 20)).close()
    assert inspect(MODEL, memory=smallest // 2)["memory"]["fits"] is False


def test_bytes_per_token_by_hand(tmp_path: Path) -> None:
    shape = Shape(layers=4, hidden=64, heads=2, kv_heads=1, head_dim=32, experts=8, used=2, expert_hidden=32)
    write_model(tmp_path / "m.gguf", shape, random_weights(shape), "Q8_0")
    model = _core.Model.open(str(tmp_path / "m.gguf"))
    expert = 64 * 32 // 32 * 34
    layer = 4 * 64 * 2 + 4 * 8 * 64 + 2 * 64 * (64 + 32) // 32 * 34
    vocabulary = shape.vocab * 64 // 32 * 34
    dense = 4 * (layer + 2 * 3 * expert) + vocabulary + 64 // 32 * 34 + 4 * 64
    assert weight_bytes(model) == dense
    assert weight_bytes(model, 0.5) == dense - 4 * 2 * expert
    assert weight_bytes(model, 1.0) == dense - 4 * 2 * 2 * expert
    head = vocabulary
    assert weight_bytes(model, head_share=0.25) == dense - head * 3 // 4
    for kv_type, size in (("f32", 32 * 4), ("f16", 32 * 2), ("auto", 32 * 2), ("q8", 32 + 2)):
        assert kv_bytes(model, 10, kv_type) == 4 * 10 * 2 * size
    assert not skips_silent_neurons(model)  # Q8_0 rows are read whole


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_file_reads_as_much_as_its_source(tmp_path: Path, tied: bool) -> None:
    # Experts of whole pages: the packed layout pads smaller ones.
    shape = synth.Shape("m", 2, 512, 8, 4, 64, 8, 2, 256, 1024, 512, 0, False, tied)
    synth.write(tmp_path / "stock.gguf", shape)
    pack(tmp_path / "stock.gguf", tmp_path / "packed.gguf")
    stock, packed = (_core.Model.open(str(tmp_path / f"{name}.gguf")) for name in ("stock", "packed"))
    for sparsity in (0.0, 0.62):
        assert weight_bytes(packed, sparsity) == pytest.approx(weight_bytes(stock, sparsity), rel=0.05)
    assert inspect(tmp_path / "packed.gguf")["file"]["layout"] == "packed"
    assert skips_silent_neurons(packed) and not skips_silent_neurons(stock, "reference")
    report = inspect(tmp_path / "packed.gguf")["per_token"]
    assert report["sparse_bytes"] == weight_bytes(packed, 0.62) < report["dense_bytes"]
    shown = table(inspect(tmp_path / "packed.gguf"))
    assert "checksums (--json shows them)" in shown and "checksum.blk" not in shown
    assert "packed.version: 1" in shown


def test_windowed_layers_read_their_window_only(tmp_path: Path) -> None:
    shape = Shape(layers=5, window=8, vocab=67)
    write_model(tmp_path / "m.gguf", shape, random_weights(shape))
    model = _core.Model.open(str(tmp_path / "m.gguf"))
    assert kv_bytes(model, 100, "f16") == (2 * 100 + 3 * 8) * 2 * shape.kv_heads * shape.head_dim * 2
    assert kv_bytes(model, 100) == 2 * kv_bytes(model, 100, "f16")  # F32 weights have F32 keys
    shown = table(inspect(tmp_path / "m.gguf"))
    assert "2 global without RoPE (0, 4)" in shown and "3 windowed (8 keys) with RoPE (1, 2, 3)" in shown
    assert "none in the file" in shown


def test_keys_and_values_are_counted_as_they_are_kept() -> None:
    plain, rounded = (inspect(MODEL, kv_type=kv_type) for kv_type in ("auto", "q8"))
    with Engine.open(MODEL, threads=1, kv_type="q8") as engine:
        assert rounded["memory"]["parts"]["kv_bytes"] == engine.info.plan.kv_bytes
        smaller = (engine.info.head_dim + 2) / (2 * engine.info.head_dim)
    assert rounded["per_token"]["kv_bytes"] / plain["per_token"]["kv_bytes"] == pytest.approx(smaller)
    assert rounded["memory"]["parts"]["kv_bytes"] / plain["memory"]["parts"]["kv_bytes"] == pytest.approx(
        smaller
    )
    # Q8_0 experts: silent neurons are read too, and no share of them changes that.
    assert plain["per_token"]["sparse_bytes"] == plain["per_token"]["dense_bytes"]
    assert "silent neurons are read too" in table(plain)
    done = run(MODEL, "--kv", "q8", "--json")
    assert json.loads(done.stdout)["per_token"]["kv_bytes"] == rounded["per_token"]["kv_bytes"]


def test_the_command() -> None:
    done = run(MODEL, "--memory", "1GiB", "--context", 128)
    assert done.returncode == 0, done.stderr
    assert (
        "smallest budget" in done.stdout
        and "reads per token" in done.stdout
        and "stock layout" in done.stdout
    )
    done = run(MODEL, "--json", "--threads", 1, "--sparsity", 0)
    report = json.loads(done.stdout)
    assert report["per_token"]["dense_bytes"] == report["per_token"]["sparse_bytes"]
    done = run(MODEL, "--memory", "1MiB")
    assert done.returncode == 1 and "does not fit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.gguf"], "no model file at nothing.gguf"),
        ([__file__], "GGUF"),
        ([GOLDEN / "tiny-4b-f32.gguf", "--memory", "much"], "memory is 'much'"),
        ([GOLDEN / "tiny-4b-f32.gguf", "--context", "0"], "--context is 0"),
        ([GOLDEN / "tiny-4b-f32.gguf", "--threads", "0"], "--threads is 0"),
        ([GOLDEN / "tiny-4b-f32.gguf", "--sparsity", "2"], "--sparsity is 2.0"),
    ],
)
def test_it_names_what_is_wrong(arguments: list[object], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
