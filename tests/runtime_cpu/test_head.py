"""The predicted head in the engine: opt-in, exact where it computes, minus infinity elsewhere, and said aloud."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from runtime_cpu import Engine, EngineError, ModelFileError
from runtime_cpu.commands.inspect_model import inspect
from runtime_cpu.commands.inspect_model import main as inspect_main
from runtime_cpu.engine.options import available_kernels
from runtime_cpu.pack.packing import pack
from runtime_cpu.serve.__main__ import main as serve
from tests.runtime_cpu.small_models import Shape, random_weights, write_model

SHAPE = Shape(layers=2, hidden=64, heads=4, head_dim=16, experts=4, used=2, expert_hidden=64, vocab=1500)
WIDTH = 32
PROMPT = [3, 1499, 7, 7, 800, 64, 2, 90, 11]
KEYS: dict[str, Any] = {"width": WIDTH, "threshold": 1.0, "recall": 0.987, "missed_argmax": 0.0125}


def write(path: Path, kind: str = "Q4_0", seed: int = 0, **keys: float) -> Path:
    """A random model of ``SHAPE`` with a random predictor."""
    random = np.random.default_rng(seed)
    weights = random_weights(SHAPE, seed)
    weights["head_predictor.down.weight"] = (
        random.standard_normal((WIDTH, SHAPE.hidden)).astype(np.float32) / 8
    )
    weights["head_predictor.up.weight"] = random.standard_normal((SHAPE.vocab, WIDTH)).astype(np.float32) / 4
    plain = write_model(path.with_suffix(".plain"), SHAPE, weights, kind)
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, "smallthinker")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in (KEYS | keys).items():
        add = writer.add_uint32 if name == "width" else writer.add_float32
        add(f"smallthinker.head_predictor.{name}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain.unlink()
    return path


def named_rows(path: Path, states: NDArray[np.float32]) -> NDArray[np.bool_]:
    """What the file's own weights say, in plain numpy."""
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    inner = states @ stored["head_predictor.down.weight"].T
    return inner @ stored["head_predictor.up.weight"].T > KEYS["threshold"]


@pytest.mark.parametrize("kernels", available_kernels())
@pytest.mark.parametrize("form", ["F32", "Q8_0", "Q4_0", "packed"])
def test_computed_rows_have_the_exact_bits_and_the_others_are_minus_infinity(
    tmp_path: Path, form: str, kernels: str
) -> None:
    stock = write(tmp_path / "stock.gguf", "Q4_0" if form == "packed" else form)
    path = stock
    if form == "packed":
        path = tmp_path / "packed.gguf"
        pack(stock, path)
    with Engine.open(path, threads=1, kernels=kernels) as engine:
        exact = engine.logits(PROMPT)
        assert engine.info.head == "exact" and engine.stats.head_row_share == 1.0
    with Engine.open(path, threads=1, kernels=kernels, head="predictor") as engine:
        found = engine.logits(PROMPT)
        share = engine.stats.head_row_share
        assert engine.stats.head_fallbacks == 0
        one_by_one = engine.generate(PROMPT, 5, stop_ids=())
        tokens = [token.id for token in one_by_one]
    lost = np.isneginf(found)
    assert np.array_equal(found[~lost], exact[~lost])
    assert not np.isneginf(exact).any() and 0.05 < lost.mean() < 0.95
    assert share == pytest.approx(1 - lost.mean())
    for threads, chunk in ((2, 1), (3, 4), (4, 256)):
        with Engine.open(path, threads, kernels=kernels, head="predictor", chunk_tokens=chunk) as engine:
            assert np.array_equal(engine.logits(PROMPT), found)
            assert [token.id for token in engine.generate(PROMPT, 5, stop_ids=())] == tokens


def test_the_named_rows_are_those_of_the_file(tmp_path: Path) -> None:
    """The head of one position is a plain product, so states can be solved from its exact logits."""
    path = write(tmp_path / "m.gguf", "F32")
    with Engine.open(path, kernels="reference") as engine:
        exact = engine.logits(PROMPT)
    head = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}["output.weight"]
    states = np.linalg.lstsq(head.astype(np.float64), exact.T.astype(np.float64), rcond=None)[0].T
    with Engine.open(path, kernels="reference", head="predictor") as engine:
        found = ~np.isneginf(engine.logits(PROMPT))
    assert (named_rows(path, states.astype(np.float32)) != found).mean() < 1e-3


def test_too_few_named_rows_mean_the_whole_head(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", threshold=1e6)
    with Engine.open(path) as engine:
        exact = engine.logits(PROMPT)
    with Engine.open(path, head="predictor") as engine:
        assert np.array_equal(engine.logits(PROMPT), exact)
        assert engine.stats.head_fallbacks == len(PROMPT) and engine.stats.head_row_share == 1.0


def test_sampling_takes_computed_rows_only(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    with Engine.open(path, head="predictor") as engine:
        named = ~np.isneginf(engine.logits(PROMPT)[-1])
        for seed in range(30):
            (token,) = engine.generate(PROMPT, 1, temperature=1.5, seed=seed, stop_ids=(), logprobs=3)
            assert named[token.id] and all(np.isfinite(value) for _, value in token.top)
            (token,) = engine.generate(
                PROMPT,
                1,
                temperature=1.0,
                top_k=40,
                top_p=0.9,
                repetition_penalty=1.3,
                seed=seed,
                stop_ids=(),
            )
            assert named[token.id]


def test_a_file_without_a_predictor_and_a_wrong_word_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", SHAPE, random_weights(SHAPE), "Q4_0")
    with pytest.raises(
        EngineError, match=r"m\.gguf has no predictor of its head's rows; open it with head='exact'"
    ):
        Engine.open(path, head="predictor")
    with pytest.raises(ValueError, match="head is 'fast'; allowed are 'exact' and 'predictor'"):
        Engine.open(path, head="fast")
    with Engine.open(path) as engine:
        assert engine.info.head_predictor is None


def test_a_predictor_changes_nothing_for_those_who_do_not_ask(tmp_path: Path) -> None:
    with_it = write(tmp_path / "with.gguf", "F32")
    without = write_model(tmp_path / "without.gguf", SHAPE, random_weights(SHAPE), "F32")
    with Engine.open(with_it) as one, Engine.open(without) as other:
        assert np.array_equal(one.logits(PROMPT), other.logits(PROMPT))
        for name in ("parameters", "weight_bytes", "kv_type", "file_type", "head"):
            assert getattr(one.info, name) == getattr(other.info, name)
        assert one.info.plan.weight_bytes == other.info.plan.weight_bytes
    reports = [inspect(path)["per_token"] for path in (with_it, without)]
    assert reports[0] == reports[1]


def test_the_plan_counts_the_predictor(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    with Engine.open(path) as exact, Engine.open(path, head="predictor") as predicting:
        more = predicting.info.plan.weight_bytes - exact.info.plan.weight_bytes
        assert more >= (SHAPE.vocab + SHAPE.hidden) * WIDTH * 18 // 32


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"width": 48}, "head_predictor.down.weight' has the shape"),
        ({"width": 0}, "head_predictor.width is 0"),
        ({"recall": float("nan")}, "head_predictor.recall is nan"),
        ({"missed_argmax": 1.5}, "head_predictor.missed_argmax is 1.5"),
        ({"threshold": float("inf")}, "head_predictor.threshold is inf"),
    ],
)
def test_malformed_predictors_are_refused_whoever_opens_the_file(
    tmp_path: Path, keys: dict[str, float], message: str
) -> None:
    path = write(tmp_path / "m.gguf", **keys)
    with pytest.raises(ModelFileError, match=message):
        Engine.open(path)


def test_people_are_told_what_can_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, packed = write(tmp_path / "m.gguf"), tmp_path / "packed.gguf"
    pack(stock, packed)
    sentence = "tokens can be lost: at export the predictor named 98.70% of the rows that matter, and missed"
    for path in (stock, packed):
        with Engine.open(path, head="predictor") as engine:
            assert sentence in str(engine.info.head_predictor) and "1.25% of positions" in str(
                engine.info.head_predictor
            )
        assert inspect_main([str(path)]) == 0
        assert sentence in capsys.readouterr().out
        assert inspect_main([str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["head_predictor"]["width"] == WIDTH
    monkeypatch.setattr("runtime_cpu.serve.__main__.build_app", lambda *_: None)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    for head, told in (("predictor", True), ("exact", False)):
        assert serve([str(stock), "--port", "0", "--head", head]) == 0
        assert (sentence in capsys.readouterr().err) is told
    bare = write_model(tmp_path / "bare.gguf", SHAPE, random_weights(SHAPE), "Q4_0")
    assert serve([str(bare), "--port", "0", "--head", "predictor"]) == 2
    assert "has no predictor" in capsys.readouterr().err
