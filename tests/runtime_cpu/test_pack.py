"""Packed files: the same weights and bits as the stock file, torn or bent ones refused, interrupted ones not left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_cpu import Engine, EngineError, ModelFileError, _core, pack
from tests.runtime_cpu.small_models import Shape, random_weights, write_model

GOLDEN = Path(__file__).parent.parent / "golden" / "gguf"
PROMPT = [int(i) for i in np.load(GOLDEN / "tiny-21b-q4_0.npz")["input_ids"][:40]]
SMALL = Shape(layers=3, hidden=64, heads=4, head_dim=16, experts=6, used=2, expert_hidden=64, vocab=70)


def offloading(path: Path, slots: int, threads: int = 2, reader: str = "auto", policy: str = "") -> Engine:
    """An engine with room for so many experts, whatever this process weighs."""
    engine = Engine.open(path, threads=threads, context=128, chunk_tokens=16)
    model = engine._model
    room = slots * model.expert_bytes
    engine._runtime = _core.Runtime(
        model,
        threads=threads,
        context=128,
        kernels=engine.info.kernels,
        chunk_tokens=16,
        expert_cache_bytes=room,
        reader=reader,
        policy=policy,
    )
    return engine


@pytest.fixture(scope="module", params=["tiny-4b", "tiny-21b", "small-untied"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A stock file and its packed form."""
    folder = tmp_path_factory.mktemp("packed")
    if request.param == "small-untied":
        stock = write_model(folder / "stock.gguf", SMALL, random_weights(SMALL, 3), "Q4_0")
    else:
        stock = GOLDEN / f"{request.param}-q4_0.gguf"
    pack.pack(stock, folder / "packed.gguf", threads=2)
    return stock, folder / "packed.gguf"


def prompt_for(engine: Engine) -> list[int]:
    return [token % engine.info.vocab_size for token in PROMPT]


def test_a_packed_file_gives_the_same_bits(files: tuple[Path, Path]) -> None:
    stock, packed = (Engine.open(path, threads=2, context=128) for path in files)
    with stock, packed:
        prompt = prompt_for(stock)
        assert packed._model.packed and not stock._model.packed
        assert packed.info.parameters == stock.info.parameters
        assert packed.info.file_type == stock.info.file_type == "Q4_0"
        if "avx512" in stock.info.kernels:  # others read stock rows of a stock file
            assert np.array_equal(packed.logits(prompt), stock.logits(prompt))
        np.testing.assert_allclose(packed.logits(prompt), stock.logits(prompt), rtol=0, atol=5e-3)
        left, right = packed.metadata, stock.metadata
        own = [key for key in left if ".packed." in key]
        assert {
            k: v for k, v in left.items() if k not in [*own, "general.alignment", "smallthinker.vocab_size"]
        } == {k: v for k, v in right.items() if k not in ("general.alignment", "smallthinker.vocab_size")}


@pytest.mark.parametrize("reader", ["io_uring", "threads", "page_cache"])
@pytest.mark.parametrize("source", ["stock", "packed"])
def test_experts_on_disk_give_the_same_bits(files: tuple[Path, Path], source: str, reader: str) -> None:
    path = files[source == "packed"]
    with offloading(path, 10**6) as whole:
        prompt = prompt_for(whole)
        expected = whole.logits(prompt)
        used = whole.info.experts_per_token
        generated = [t.id for t in whole.generate(prompt[:9], 12, stop_ids=())]
        assert whole._runtime is not None and not whole._runtime.expert_counters()
    for slots, threads in ((used, 1), (used + 1, 3), (2 * used, 2), (whole.info.experts, 4)):
        try:
            engine = offloading(path, slots, threads, reader=reader, policy="lru" if slots == used else "")
        except EngineError as error:
            if reader == "page_cache":
                raise
            pytest.skip(str(error))
        with engine:
            assert np.array_equal(engine.logits(prompt), expected), (slots, threads)
            tokens = [t.id for t in engine.generate(prompt[:9], 12, stop_ids=())]
            assert tokens == generated
            stats = engine.stats
            assert stats.cache_misses > 0 and stats.bytes_read > 0 and 0 <= stats.cache_hit_rate < 1
            assert engine._runtime is not None
            assert engine._runtime.expert_counters()["backend"] == reader


def test_statistics_put_hot_experts_first(files: tuple[Path, Path], tmp_path: Path) -> None:
    stock, packed = files
    with Engine.open(stock, threads=1, context=128) as engine:
        prompt = prompt_for(engine)
        engine.logits(prompt)
        counts = engine.stats.expert_counts
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"expert_counts": counts}))
    assert pack.main([str(stock), str(tmp_path / "hot.gguf"), "--stats", str(stats)]) == 0
    with offloading(packed, 10**6) as plain, offloading(tmp_path / "hot.gguf", 10**6) as hot:
        assert np.array_equal(plain.logits(prompt), hot.logits(prompt))
        order = np.reshape(hot.metadata["smallthinker.packed.expert_order"], np.shape(counts))
        ranked = np.take_along_axis(np.asarray(counts), order, 1)
        assert (np.diff(ranked, axis=1) <= 0).all()
    with offloading(tmp_path / "hot.gguf", 4) as small:  # warmed from the statistics
        assert small._runtime is not None
        deadline = time.monotonic() + 10
        while small._runtime.expert_counters()["bytes_read"] < 4 * small._model.expert_bytes:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert np.array_equal(small.logits(prompt), plain_bits(packed, prompt))


def plain_bits(path: Path, prompt: list[int]) -> np.ndarray:
    with offloading(path, 10**6) as engine:
        return engine.logits(prompt)


def test_bits_do_not_depend_on_what_has_been_copied(files: tuple[Path, Path]) -> None:
    """Experts are computed with in the file's own pages until the background threads have copied them."""
    with Engine.open(files[1], threads=2, context=128) as engine:
        prompt = prompt_for(engine)
        engine._runtime.load_all()
        expected = engine.logits(prompt)
    for _ in range(15):
        with Engine.open(files[1], threads=4, context=128) as engine:
            assert np.array_equal(engine.logits(prompt[:1]), expected[:1])
            assert np.array_equal(engine.logits(prompt), expected)


def test_damaged_experts_end_the_request_and_nothing_else(files: tuple[Path, Path], tmp_path: Path) -> None:
    packed = bytearray(files[1].read_bytes())
    model = _core.Model.open(str(files[1]))
    offset = next(offset for name, _, _, offset, _ in model.tensors() if name == "blk.1.ffn_experts.packed")
    packed[offset : offset + 64] = bytes(b ^ 0x40 for b in packed[offset : offset + 64])  # expert 0
    bent = tmp_path / "bent.gguf"
    bent.write_bytes(packed)
    for slots in (10**6, model.experts_per_token):
        with offloading(bent, slots) as engine:
            prompt = prompt_for(engine)
            with pytest.raises(EngineError, match="checksum"):
                engine.logits(prompt)
            with pytest.raises(EngineError, match="checksum"):
                engine.logits(prompt)  # the same again: nothing was taken for sound


def test_damaged_dense_matrices_are_refused_at_once(files: tuple[Path, Path], tmp_path: Path) -> None:
    packed = bytearray(files[1].read_bytes())
    model = _core.Model.open(str(files[1]))
    name, offset = next(
        (name, offset) for name, _, _, offset, _ in model.tensors() if name.endswith(".tiles")
    )
    packed[offset + 100] ^= 1
    (tmp_path / "bent.gguf").write_bytes(packed)
    with pytest.raises(ModelFileError, match="checksum"):
        Engine.open(tmp_path / "bent.gguf", context=64)
    assert name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), change=st.integers(1, 255), cut=st.booleans())
def test_no_bent_byte_passes(
    files: tuple[Path, Path], tmp_path: Path, place: float, change: int, cut: bool
) -> None:
    """A changed or missing byte is refused, reported, or lies in padding and metadata that change no logit's shape."""
    original = files[1].read_bytes()
    at = min(int(place * len(original)), len(original) - 1)
    bent = tmp_path / "bent.gguf"
    bent.write_bytes(
        original[:at] if cut else original[:at] + bytes([original[at] ^ change]) + original[at + 1 :]
    )
    prompt: list[int] = []
    try:
        with offloading(bent, 4) as engine:
            prompt = prompt_for(engine)[:6]
            assert engine.logits(prompt).shape[0] == len(prompt)
    except (EngineError, ValueError):
        return
    weights = _core.Model.open(str(files[1])).tensors()
    inside = [
        name for name, kind, _, offset, size in weights if kind == "I8" and offset <= at < offset + size
    ]
    with offloading(files[1], 4) as sound, offloading(bent, 4) as engine:
        if inside and inside != ["experts.checksums"]:
            # Experts that this prompt does not use keep their damage to themselves.
            assert np.array_equal(engine.logits(prompt), sound.logits(prompt))


def test_what_cannot_be_packed(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock, packed = files
    cases = [
        ([str(packed), str(tmp_path / "x.gguf")], "packed already"),
        ([str(GOLDEN / "tiny-4b-q8_0.gguf"), str(tmp_path / "x.gguf")], "experts of type Q8_0"),
        ([str(tmp_path / "none.gguf"), str(tmp_path / "x.gguf")], "no model file"),
        ([str(stock), str(tmp_path / "no" / "x.gguf")], "No such file"),
        ([str(stock), str(stock)], "source itself"),
        ([str(stock), str(tmp_path / "x.gguf"), "--stats", str(stock)], "no expert_counts"),
    ]
    for arguments, message in cases:
        assert pack.main(arguments) == 2
        assert message in capsys.readouterr().err
    bad = tmp_path / "stats.json"
    bad.write_text('{"expert_counts": [[1, 2], [3]]}')
    assert pack.main([str(stock), str(tmp_path / "x.gguf"), "--stats", str(bad)]) == 2
    assert list(tmp_path.glob("*.gguf")) == []


def test_an_interrupted_run_leaves_nothing_that_loads(tmp_path: Path) -> None:
    shape = Shape(
        layers=10, hidden=512, heads=4, head_dim=64, experts=24, used=2, expert_hidden=256, vocab=900
    )
    stock = write_model(tmp_path / "stock.gguf", shape, random_weights(shape), "Q4_0")
    target = tmp_path / "packed.gguf"
    partial = tmp_path / f".{target.name}.partial"
    killed = 0
    for written in (1, 10_000_000, 40_000_000):
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime_cpu.pack", str(stock), str(target), "--threads", "1"],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )
        while process.poll() is None and not (partial.exists() and partial.stat().st_size >= written):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if target.exists():
            with Engine.open(target, context=32) as engine:
                engine.logits([1, 2, 3])
            target.unlink()
    assert killed > 0
    assert pack.main([str(stock), str(target)]) == 0
    with Engine.open(target, context=32) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()
