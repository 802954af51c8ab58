"""The forward pass against golden files and against the specification in numpy; promises about bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from runtime_cpu import Engine
from runtime_cpu.engine.options import available_kernels
from tests.runtime_cpu.small_models import (
    Shape,
    random_weights,
    reference_logits,
    row_errors,
    stored_weights,
    write_model,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "gguf"
SHAPES = {
    "plain": Shape(),
    "llama.cpp period": Shape(window=9, layers=6),
    "own layouts": Shape(window=13, rope=(1, 0, 0, 1), windowed=(0, 1, 0, 1), tied=True),
    "window of one": Shape(window=1, rope=(1, 1, 1, 1), windowed=(1, 1, 0, 1)),
    "sigmoid, all experts": Shape(softmax=False, used=5, heads=7, kv_heads=1, tied=True),
    "router one layer ahead": Shape(router_lead=1, window=9, layers=6),
    "router two layers ahead": Shape(router_lead=2, softmax=False, layers=5, used=3),
    "all routers at the start": Shape(router_lead=7),
    "one expert, wide heads": Shape(used=1, heads=2, kv_heads=2, head_dim=64, hidden=33, expert_hidden=7),
}


def relative(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("kernels", available_kernels())
@pytest.mark.parametrize("name", ["tiny-21b-f32", "tiny-4b-f32"])
def test_f32_golden_rows_are_exact(name: str, kernels: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    with Engine.open(GOLDEN / f"{name}.gguf", threads=2, context=128, kernels=kernels) as engine:
        errors = row_errors(engine.logits(golden["input_ids"]), golden["logits_exact"])
    assert errors.max() <= 1e-5


@pytest.mark.parametrize("kernels", available_kernels())
@pytest.mark.parametrize("name", ["tiny-21b-q8_0", "tiny-4b-q8_0", "tiny-21b-q4_0", "tiny-4b-q4_0"])
def test_quantised_golden_rows_are_no_further_than_llama_cpp(name: str, kernels: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    exact = golden["logits_exact"]
    with Engine.open(GOLDEN / f"{name}.gguf", threads=2, context=128, kernels=kernels) as engine:
        ours = row_errors(engine.logits(golden["input_ids"]), exact)
    theirs = row_errors(golden["logits_llamacpp"], exact)
    for share in (50, 90):
        assert np.percentile(ours, share) <= 1.1 * np.percentile(theirs, share)
    assert np.median(ours) < 3e-3  # what 16-bit activations and F16 keys really give; far below the bar


@pytest.mark.parametrize("kernels", available_kernels())
@pytest.mark.parametrize("name", list(SHAPES))
def test_logits_follow_the_specification(name: str, kernels: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    weights = random_weights(shape, seed=len(name))
    ids = np.random.default_rng(1).integers(0, shape.vocab, 60).astype(np.int32)
    exact = reference_logits(shape, weights, ids)
    with Engine.open(write_model(tmp_path / "m.gguf", shape, weights), threads=2, kernels=kernels) as engine:
        assert engine.info.kv_type == "f32"
        errors = row_errors(engine.logits(ids), exact)
    # Random weights amplify rounding in some rows; a wrong expert or key would show as 1e-2 and more (below).
    assert np.median(errors) < 1e-5 and errors.max() < 1e-4


def test_wrong_variants_are_far_away() -> None:
    """The test above can fail: each of these mistakes moves the logits by more than a thousand times its bound."""
    shape = SHAPES["own layouts"]
    weights = random_weights(shape)
    ids = np.random.default_rng(1).integers(0, shape.vocab, 60).astype(np.int32)
    exact = reference_logits(shape, weights, ids)
    for wrong in (
        reference_logits(shape, weights, ids, router_reads="normed"),
        reference_logits(shape, weights, ids, router_reads="late"),
        reference_logits(shape, weights, ids, window_error=1),
        reference_logits(shape, weights, ids, window_error=-1),
        reference_logits(shape, weights, ids, rope=(0, 1, 1, 1)),
        reference_logits(shape, weights, ids, windowed=(0, 1, 1, 1)),
        reference_logits(dataclasses.replace(shape, softmax=False), weights, ids),
        *(reference_logits(dataclasses.replace(shape, router_lead=lead), weights, ids) for lead in (1, 2, 3)),
    ):
        assert relative(wrong, exact) > 1e-2


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_stored_types_mean_what_the_gguf_package_says(kind: str, tmp_path: Path) -> None:
    shape = Shape(hidden=64, expert_hidden=96, heads=4, head_dim=16, window=7)
    path = write_model(tmp_path / "m.gguf", shape, random_weights(shape), kind)
    ids = np.random.default_rng(2).integers(0, shape.vocab, 50).astype(np.int32)
    exact = reference_logits(shape, stored_weights(path), ids)
    for kernels in available_kernels():
        with Engine.open(path, threads=2, kernels=kernels, kv_type="f32") as engine:
            assert engine.info.file_type == kind
            bound = 1e-5 if kernels == "reference" or kind.endswith("F16") else 1e-3
            assert np.median(row_errors(engine.logits(ids), exact)) < bound


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_threads_chunks_and_steps_do_not_change_a_bit(kv_type: str, tmp_path: Path) -> None:
    shape = Shape(hidden=64, expert_hidden=64, heads=4, head_dim=40, window=21)
    path = write_model(tmp_path / "m.gguf", shape, random_weights(shape), "Q4_0")
    ids = np.random.default_rng(3).integers(0, shape.vocab, 300).astype(np.int32)
    with Engine.open(path, threads=1, kv_type=kv_type) as engine:
        expected = engine.logits(ids)
    for threads, chunk in ((2, 1), (3, 17), (4, 64), (2, 500)):
        with Engine.open(path, threads=threads, chunk_tokens=chunk, kv_type=kv_type) as engine:
            assert np.array_equal(engine.logits(ids), expected)


@pytest.mark.parametrize("kernels", available_kernels())
@pytest.mark.parametrize("head_dim", [16, 40, 64])  # less than a block, a block and a part, two
def test_8_bit_keys_and_values_stay_close(head_dim: int, kernels: str, tmp_path: Path) -> None:
    """Through global layers and through several turns of a ring; and they are what is stored, not F32."""
    shape = Shape(window=70, rope=(1,) * 4, windowed=(0, 1, 1, 1), context=500, head_dim=head_dim)
    weights = random_weights(shape)
    path = write_model(tmp_path / "m.gguf", shape, weights)
    ids = np.random.default_rng(4).integers(0, shape.vocab, 450).astype(np.int32)
    exact = reference_logits(shape, weights, ids)
    errors = {}
    for kv_type, vector_bytes in (("f32", 4 * head_dim), ("q8", head_dim + 2 * -(-head_dim // 32))):
        with Engine.open(path, 2, kernels=kernels, kv_type=kv_type, chunk_tokens=16, sessions=1) as engine:
            assert engine.info.kv_type == kv_type
            positions = 512 + 3 * 128  # whole runs of 64; a ring of the window and a chunk
            assert engine.info.plan.kv_bytes == 2 * positions * shape.kv_heads * vector_bytes
            errors[kv_type] = row_errors(engine.logits(ids), exact)
    assert 50 * np.median(errors["f32"]) < np.median(errors["q8"])
    # A first token sees itself; later ones add up to what random weights amplify, a flipped expert most of all.
    assert errors["q8"][0] < 0.03 and np.median(errors["q8"]) < 0.15


def test_context_of_the_ring_and_beyond(tmp_path: Path) -> None:
    """Decoding far past the window, one token at a time, through several turns of the ring."""
    shape = Shape(window=5, rope=(1,) * 4, windowed=(1,) * 4, context=400)
    weights = random_weights(shape)
    path = write_model(tmp_path / "m.gguf", shape, weights)
    with Engine.open(path, chunk_tokens=1) as engine:
        assert (
            engine.info.plan.kv_bytes == 4 * 4 * 2 * 64 * shape.kv_heads * shape.head_dim * 4
        )  # 64 keys, not 400
        ids = np.random.default_rng(4).integers(0, shape.vocab, 399).astype(np.int32)
        errors = row_errors(engine.logits(ids), reference_logits(shape, weights, ids))
    assert np.median(errors) < 1e-5 and errors.max() < 1e-4


@pytest.mark.parametrize("kernels", available_kernels())
def test_a_long_text_with_sharp_attention(kernels: str, tmp_path: Path) -> None:
    """Scores of some tens, so that a few of 1,290 keys outweigh the others."""
    shape = Shape(window=700, rope=(1, 0), windowed=(0, 1), layers=2, context=1300)
    weights = random_weights(shape)
    for layer in range(shape.layers):
        weights[f"blk.{layer}.attn_q.weight"] *= 20
    path = write_model(tmp_path / "m.gguf", shape, weights)
    ids = np.random.default_rng(4).integers(0, shape.vocab, 1290).astype(np.int32)
    exact = reference_logits(shape, weights, ids)
    rows = []
    for threads, chunk in ((1, 128), (2, 1), (3, 7)):
        with Engine.open(path, threads, kernels=kernels, chunk_tokens=chunk) as engine:
            rows.append(engine.logits(ids))
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])
    errors = row_errors(rows[0], exact)
    assert np.median(errors) < 1e-5 and errors.max() < 1e-3
