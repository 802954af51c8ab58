"""Packed files: the same weights and bits as the stock file, torn or bent ones refused, interrupted ones not left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_cpu import Engine, EngineError, ModelFileError, _core
from runtime_cpu.pack.__main__ import main as pack_main
from runtime_cpu.pack.packing import pack
from tests.freezing import await_frozen
from tests.runtime_cpu.small_models import Shape, random_weights, write_model
from tests.waiting import CEILING_S, wait_for

GOLDEN = Path(__file__).parent.parent / "golden" / "gguf"
PROMPT = [int(i) for i in np.load(GOLDEN / "tiny-21b-q4_0.npz")["input_ids"][:40]]
SMALL = Shape(layers=3, hidden=64, heads=4, head_dim=16, experts=6, used=2, expert_hidden=64, vocab=70)


def offloading(
    path: Path, slots: int, threads: int = 2, reader: str = "auto", policy: str = ""
) -> tuple[Engine, _core.Runtime]:
    """An engine with room for so many experts, whatever this process weighs; 0: all are in memory."""
    with Engine.open(path, threads=threads, context=128, chunk_tokens=16) as opened:
        info = opened.info
    model = _core.Model.open(str(path))
    runtime = _core.Runtime(
        model,
        threads=threads,
        context=128,
        kv_type="auto",
        kernels=info.kernels,
        chunk_tokens=16,
        expert_cache_bytes=slots * model.expert_bytes,
        reader=reader,
        policy=policy,
        speculate=True,
    )
    return Engine(runtime, model, info, chunk_tokens=16, wait_s=600), runtime


@pytest.fixture(scope="module", params=["tiny-4b", "tiny-21b", "small-untied"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A stock file and its packed form."""
    folder = tmp_path_factory.mktemp("packed")
    if request.param == "small-untied":
        stock = write_model(folder / "stock.gguf", SMALL, random_weights(SMALL, 3), "Q4_0")
    else:
        stock = GOLDEN / f"{request.param}-q4_0.gguf"
    pack(stock, folder / "packed.gguf", threads=2)
    return stock, folder / "packed.gguf"


def prompt_for(engine: Engine) -> list[int]:
    return [token % engine.info.vocab_size for token in PROMPT]


def test_a_packed_file_gives_the_same_bits(files: tuple[Path, Path]) -> None:
    stock, packed = (Engine.open(path, threads=2, context=128) for path in files)
    with stock, packed:
        prompt = prompt_for(stock)
        assert [_core.Model.open(str(path)).packed for path in files] == [False, True]
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
    whole, runtime = offloading(path, 10**6)
    with whole:
        prompt = prompt_for(whole)
        expected = whole.logits(prompt)
        used = whole.info.experts_per_token
        generated = [t.id for t in whole.generate(prompt[:9], 12, stop_ids=())]
        assert not runtime.expert_counters()
    for slots, threads in ((used, 1), (used + 1, 3), (2 * used, 2), (whole.info.experts, 4)):
        try:
            engine, runtime = offloading(
                path, slots, threads, reader=reader, policy="lru" if slots == used else ""
            )
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
            assert runtime.expert_counters()["backend"] == reader


def test_statistics_put_hot_experts_first(files: tuple[Path, Path], tmp_path: Path) -> None:
    stock, packed = files
    with Engine.open(stock, threads=1, context=128) as engine:
        prompt = prompt_for(engine)
        engine.logits(prompt)
        counts = engine.stats.expert_counts
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"expert_counts": counts}))
    assert pack_main([str(stock), str(tmp_path / "hot.gguf"), "--stats", str(stats)]) == 0
    (plain, _), (hot, _) = offloading(packed, 10**6), offloading(tmp_path / "hot.gguf", 10**6)
    with plain, hot:
        assert np.array_equal(plain.logits(prompt), hot.logits(prompt))
        order = np.reshape(hot.metadata["smallthinker.packed.expert_order"], np.shape(counts))
        ranked = np.take_along_axis(np.asarray(counts), order, 1)
        assert (np.diff(ranked, axis=1) <= 0).all()
    small, runtime = offloading(tmp_path / "hot.gguf", 4)
    with small:  # warmed from the statistics
        four = 4 * _core.Model.open(str(packed)).expert_bytes
        wait_for(lambda: runtime.expert_counters()["bytes_read"] >= four, "four warm experts")
        assert np.array_equal(small.logits(prompt), plain_bits(packed, prompt))


def plain_bits(path: Path, prompt: list[int]) -> np.ndarray:
    with offloading(path, 10**6)[0] as engine:
        return engine.logits(prompt)


def test_bits_do_not_depend_on_what_has_been_copied(files: tuple[Path, Path]) -> None:
    """Experts are computed with in the file's own pages until the background threads have copied them."""
    engine, runtime = offloading(files[1], 0)
    with engine:
        prompt = prompt_for(engine)
        runtime.load_all()
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
        with offloading(bent, slots)[0] as engine:
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


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
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
        with offloading(bent, 4)[0] as engine:
            prompt = prompt_for(engine)[:6]
            assert engine.logits(prompt).shape[0] == len(prompt)
    except (EngineError, ValueError):
        return
    weights = _core.Model.open(str(files[1])).tensors()
    inside = [
        name for name, kind, _, offset, size in weights if kind == "I8" and offset <= at < offset + size
    ]
    with offloading(files[1], 4)[0] as sound, offloading(bent, 4)[0] as engine:
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
        assert pack_main(arguments) == 2
        assert message in capsys.readouterr().err
    bad = tmp_path / "stats.json"
    bad.write_text('{"expert_counts": [[1, 2], [3]]}')
    assert pack_main([str(stock), str(tmp_path / "x.gguf"), "--stats", str(bad)]) == 2
    assert list(tmp_path.glob("*.gguf")) == []


PACK_ALL_BUT_THE_NAME = """
import sys
from pathlib import Path
from runtime_cpu.pack.__main__ import main
from tests.freezing import freeze_when
partial, size = Path(sys.argv[1]), int(sys.argv[2])
freeze_when(lambda: partial.exists() and partial.stat().st_size >= size)
main(sys.argv[3:])
"""


def test_an_interrupted_run_leaves_nothing_that_loads(tmp_path: Path) -> None:
    shape = Shape(
        layers=10, hidden=512, heads=4, head_dim=64, experts=24, used=2, expert_hidden=256, vocab=900
    )
    stock = write_model(tmp_path / "stock.gguf", shape, random_weights(shape), "Q4_0")
    target, whole = tmp_path / "packed.gguf", tmp_path / "whole.gguf"
    partial = tmp_path / f".{target.name}.partial"
    pack(stock, whole, threads=1)
    program = [sys.executable, "-c", PACK_ALL_BUT_THE_NAME, str(partial), str(whole.stat().st_size)]
    arguments = [str(stock), str(target), "--threads", "1"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    for written in (1, 10_000_000, 40_000_000):  # the kernel ends it at the next byte
        limited = [sys.executable, "-m", "tests.freezing", "--bytes", str(written), "runtime_cpu.pack"]
        done = subprocess.run([*limited, *arguments], env=environment, timeout=CEILING_S)
        assert done.returncode == -signal.SIGXFSZ
        assert partial.stat().st_size == written and not target.exists()
    process = subprocess.Popen([*program, *arguments], env=environment)
    await_frozen(process.pid, lambda: process.poll() is None)
    process.kill()
    process.wait()
    assert partial.stat().st_size == whole.stat().st_size and not target.exists()
    assert pack_main([str(stock), str(target)]) == 0
    assert target.read_bytes() == whole.read_bytes()
    with Engine.open(target, context=32) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()
