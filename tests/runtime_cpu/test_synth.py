"""Models of random weights: the writer they are written with, their statistics, their tokenizer."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from runtime_cpu import Engine, synth, synth_check
from runtime_cpu.gguf_writer import GGUFWriteError, GGUFWriter, TensorInfo
from runtime_cpu.synth import Shape, group_size, text_like_ids
from runtime_cpu.synth_vocabulary import SynthError, synthetic_vocabulary
from tests.waiting import CEILING_S

SMALL = Shape(
    name="small",
    layers=4,
    hidden=512,
    heads=4,
    kv_heads=2,
    head_dim=64,
    experts=32,
    used=4,
    expert_hidden=96,
    vocab=4096,
    context=1024,
    window=0,
    softmax=False,
    tied=True,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "small.gguf"
    synth.write(path, SMALL)
    return path


@pytest.fixture(scope="module")
def measured(model: Path) -> synth_check.Measured:
    return synth_check.measure(model, tokens=1000, steps=300, threads=1)


def test_the_same_seed_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    synth.write(tmp_path / "again.gguf", SMALL)
    synth.write(tmp_path / "other.gguf", SMALL, seed=1)
    assert (tmp_path / "again.gguf").read_bytes() == model.read_bytes()
    other = gguf.GGUFReader(tmp_path / "other.gguf")
    for mine, theirs in zip(gguf.GGUFReader(model).tensors, other.tensors, strict=True):
        assert mine.name == theirs.name
        assert "attn_norm" in mine.name or not np.array_equal(mine.data, theirs.data) or "norm" in mine.name


def test_neurons_rest_as_in_the_paper(measured: synth_check.Measured) -> None:
    for layer, share in enumerate(measured.sparsity):
        assert share == pytest.approx(synth.target_sparsity(layer), abs=0.03)
    assert min(measured.sparsity[:2]) > 0.9 and min(measured.sparsity) > 0.6


def test_experts_are_chosen_as_in_the_paper(measured: synth_check.Measured) -> None:
    assert 0.7 <= measured.rare_experts <= 0.8
    assert measured.overlaps["text-like"] == pytest.approx(0.37, abs=0.06)
    assert measured.overlaps["independent"] < 0.3


def test_numbers_stay_sensible(measured: synth_check.Measured) -> None:
    assert 1 < measured.logit_std < 5 and measured.largest_logit < 30
    # 4,096 ids allow short circles only late; the real vocabularies give some 180 different tokens in 219.
    assert measured.distinct_greedy > 20, "greedy decoding runs in a circle"


def test_overlap_can_be_chosen(tmp_path: Path) -> None:
    low = synth.simulate_routing(SMALL, 0.25)
    high = synth.simulate_routing(SMALL, 0.4)
    assert 0 <= low.group_share < high.group_share < 1
    assert low.frequency_E.sum() == pytest.approx(SMALL.used)
    for overlap in (0.05, 0.9, float("nan")):
        with pytest.raises(SynthError, match=r"--overlap is .* popularity alone gives 0\.2"):
            synth.simulate_routing(SMALL, overlap)


def test_the_large_size_has_windows_and_a_head_of_its_own(tmp_path: Path) -> None:
    """The 21B's kind of model at small sizes: softmax, untied, llama.cpp's pattern of windows."""
    shape = Shape("windowed", 5, 256, 7, 1, 64, 16, 3, 64, 1024, 512, 4096, True, False)
    synth.write(tmp_path / "windowed.gguf", shape)
    with Engine.open(tmp_path / "windowed.gguf", threads=1, context=64) as engine:
        assert not engine.info.tied_embeddings and engine.info.router == "softmax"
        assert engine.info.sliding_window_layout == engine.info.rope_layout == (0, 1, 1, 1, 0)
        assert np.isfinite(engine.logits(text_like_ids(1024, 40, 0))).all()


def test_the_real_sizes_are_the_released_ones() -> None:
    from model.accounting import count_parameters
    from model.presets import preset

    for name, shape in synth.SHAPES.items():
        config = preset(name)
        assert (shape.layers, shape.hidden, shape.vocab) == (
            config.num_hidden_layers,
            config.hidden_size,
            config.vocab_size,
        )
        assert (shape.heads, shape.kv_heads, shape.head_dim) == (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        assert (shape.experts, shape.used, shape.expert_hidden) == (
            config.moe_num_primary_experts,
            config.moe_num_active_primary_experts,
            config.moe_ffn_hidden_size,
        )
        assert shape.softmax == config.moe_primary_router_apply_softmax
        assert (shape.tied, shape.context) == (config.tie_word_embeddings, config.max_position_embeddings)
        windows = [int(bool(shape.window) and layer % 4 != 0) for layer in range(shape.layers)]
        assert windows == config.sliding_window_layout
        stored = sum(int(np.prod(info.shape)) for info in synth.Synthesis(shape).tensors())
        assert stored == count_parameters(config).total


@pytest.mark.parametrize("share", [0.08, 0.3])
def test_a_random_predictor_names_about_the_share(tmp_path: Path, share: float) -> None:
    shape = dataclasses.replace(SMALL, layers=12)  # states of shallow models differ in length
    path = tmp_path / "predicting.gguf"
    synth.write(path, shape, head_share=share)
    synth.write(tmp_path / "plain.gguf", shape)
    with Engine.open(path, threads=1, context=256, head="predictor") as engine:
        logits = engine.logits(np.random.default_rng(0).integers(0, SMALL.vocab, 100))
        assert engine.stats.head_row_share == pytest.approx(share, rel=0.15)
        assert engine.stats.head_fallbacks == 0
        info = engine.info.head_predictor
        assert info is not None and (info.width, info.recall, info.missed_argmax) == (128, None, None)
    named = ~np.isneginf(logits)
    # Scattered: a row is named whatever its neighbour is, and other positions name other rows.
    assert (named[:, 1:] & named[:, :-1]).mean() == pytest.approx(named.mean() ** 2, rel=0.2)
    assert (named[0] != named[1]).mean() > share
    rows = []
    for name in ("predicting", "plain"):
        with Engine.open(tmp_path / f"{name}.gguf", threads=1, context=64) as engine:
            rows.append(engine.logits([1, 2, 3]))
    assert np.array_equal(*rows)


def test_the_tokenizer_round_trips(model: Path) -> None:
    with Engine.open(model, threads=1, context=64) as engine:
        tokenizer = engine.tokenizer
        text = "The quick brown fox\n\tisn't 42; 北京 🎉 é <|im_end|>"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) < len(text.encode())
        prompt = engine.encode_chat([{"role": "user", "content": "hello"}])
        assert prompt[0] == tokenizer.control_tokens["<|im_start|>"]
        assert tokenizer.stop_ids == {
            tokenizer.control_tokens["<|endoftext|>"],
            tokenizer.control_tokens["<|im_end|>"],
        }


def test_the_full_vocabulary_has_the_released_ids() -> None:
    metadata = synthetic_vocabulary(151936)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(tokens) == len(set(tokens)) == 151936
    assert tokens[151643:151646] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    with pytest.raises(SynthError, match="at least 264"):
        synthetic_vocabulary(100)


def test_text_stays_in_its_group() -> None:
    ids = np.array(text_like_ids(151936, 4000, 3))
    groups = ids // group_size(151936)
    assert 0.87 < (groups[1:] == groups[:-1]).mean() < 0.93
    assert ids.min() >= 0 and ids.max() < 151936 and text_like_ids(300, 50, 1) == text_like_ids(300, 50, 1)


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "runtime_cpu.synth", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=CEILING_S)

    for arguments, message in (
        (["4b", tmp_path / "x", "--layers", 0], "--layers is 0"),
        (["4b", tmp_path / "x", "--seed", -1], "--seed is -1"),
        (["4b", tmp_path / "x", "--overlap", 0.99], "--overlap is 0.99"),
        (["4b", tmp_path / "x", "--head-predictor", 1], "--head-predictor is 1.0"),
        (["4b", tmp_path / "no" / "x"], "No such file"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_writer_writes_what_the_gguf_package_reads(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((6, 64)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    quantised = {kind: gguf.quants.quantize(values, kinds[kind]) for kind in ("Q4_0", "Q8_0")}
    data = {
        "a": ("F32", values),
        "b": ("F16", values.astype(np.float16)),
        "c": ("Q4_0", quantised["Q4_0"]),
        "d": ("Q8_0", quantised["Q8_0"]),
        "e": ("I8", random.integers(-128, 127, (6, 64), np.int8)),
    }
    metadata = {
        "general.architecture": "smallthinker",
        "x.natural": 3,
        "x.negative": -3,
        "x.large": 1 << 40,
        "x.real": 0.5,
        "x.truth": True,
        "x.text": "ß",
        "x.byte": np.uint8(200),
        "x.texts": ["a", "", "ß"],
        "x.whole": [1, -2],
        "x.reals": np.array([0.25, 2], np.float64),
        "x.truths": [True, False],
    }
    infos = [TensorInfo(name, kind, (64, 6)) for name, (kind, _) in data.items()]
    with GGUFWriter(tmp_path / "a.gguf", metadata, infos, alignment=4096) as writer:
        for name, (_, array) in data.items():
            writer.write(name, (array[i : i + 1] for i in range(6)) if name != "a" else array.tobytes())
        offsets, size = writer.offsets, writer.file_bytes
    assert (tmp_path / "a.gguf").stat().st_size == size
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if key.startswith("x.")}
    assert found == {
        key: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        for key, value in metadata.items()
        if key.startswith("x.")
    }
    for tensor in reader.tensors:
        kind, array = data[tensor.name]
        assert tensor.tensor_type.name == kind and tensor.data_offset == offsets[tensor.name]
        assert tensor.data_offset % 4096 == 0
        assert tensor.data.tobytes() == array.tobytes()


def test_an_interrupted_file_leaves_nothing(tmp_path: Path) -> None:
    infos = [TensorInfo("a", "F32", (4,)), TensorInfo("b", "F32", (4,))]
    for wrong, message in (
        (lambda w: w.write("b", bytes(16)), "a was next"),
        (lambda w: w.write("a", bytes(15)), "got 15 bytes"),
        (lambda w: w.write("a", bytes(17)), "got at least 17"),
        (lambda w: w.write("a", bytes(16)), "b was declared and not written"),
    ):
        with pytest.raises(GGUFWriteError, match=message), GGUFWriter(tmp_path / "x", {}, infos) as writer:
            wrong(writer)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), GGUFWriter(tmp_path / "x", {}, infos):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: TensorInfo("a", "Q5_K", (32,)), "known are"),
        (lambda path: TensorInfo("a", "Q4_0", (33, 2)), "do not divide"),
        (lambda path: TensorInfo("a", "F32", ()), "1 to 4 sizes"),
        (lambda path: TensorInfo("a" * 64, "F32", (1,)), "1 to 63 bytes"),
        (lambda path: GGUFWriter(path, {"k": []}, []), "metadata key k: an empty list"),
        (lambda path: GGUFWriter(path, {"k": [object()]}, []), "metadata key k"),
        (lambda path: GGUFWriter(path, {}, [], alignment=48), "powers of two"),
        (lambda path: GGUFWriter(path, {}, [TensorInfo("a", "F32", (1,))] * 2), "two tensors are called a"),
    ],
)
def test_the_writer_names_what_is_wrong(make: object, message: str, tmp_path: Path) -> None:
    assert callable(make)
    with pytest.raises(GGUFWriteError, match=message):
        make(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
