"""The predictor of output rows: training helps, what is written is what was measured, and nothing changes unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from components.artifacts import StageContext, StageError
from components.export import ExportConfig, run
from components.export.config import HeadPredictorConfig
from components.export.gguf_file import GGUFModel
from components.export.head_predictor import (
    balanced_loss,
    evaluate,
    find_threshold,
    stored,
    train,
)
from components.export.head_states import collect_states, head_weight, split_windows
from components.export.head_study import measure, screens, study
from flows.overrides import resolve
from model import SmallThinkerConfig, SmallThinkerForCausalLM
from runtime_cpu import Engine
from runtime_cpu.pack.packing import pack
from tests.export.test_stage import inputs  # noqa: F401  a fixture

VOCAB, HIDDEN = 1024, 64
PART = HeadPredictorConfig(width=32, top_rows=8, positions=4096, window=32, steps=60, batch=64)


@pytest.fixture(scope="module")
def states() -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """A head, and states that lie near some of its rows, in few directions: what training leaves behind."""
    random = np.random.default_rng(0)
    spectrum = np.linspace(2.0, 0.1, HIDDEN) ** 2
    head = (random.standard_normal((VOCAB, HIDDEN)) * np.sqrt(spectrum)).astype(np.float32)
    aims = random.integers(0, VOCAB, 3000)
    all_states = head[aims] + 0.8 * random.standard_normal((3000, HIDDEN)).astype(np.float32)
    return head, np.split(all_states.astype(np.float32), [2000, 2500])


def test_training_names_fewer_rows_and_misses_fewer_than_random_weights(states) -> None:
    head, (fit, held, test) = states
    trained = train(head, (fit, held, test), PART, seed=0)
    random = np.random.default_rng(1)
    guess = [random.standard_normal(shape).astype(np.float32) for shape in ((32, HIDDEN), (VOCAB, 32))]
    shares = {}
    for name, (down, up) in {"random": guess, "trained": (trained.down, trained.up)}.items():
        threshold = find_threshold(head, held, down, up, PART)
        shares[name] = evaluate(head, test, down, up, threshold, PART.top_rows)["active_rows"]
    assert shares["trained"] < 0.2 < 0.5 < shares["random"]
    # At as many rows as the trained one reads, random weights miss almost every one.
    scores = test @ guess[0].T @ guess[1].T
    bar = float(np.quantile(scores, 1 - trained.report["active_rows"]))
    missed = evaluate(head, test, *guess, bar, PART.top_rows)["missed_argmax"]
    assert trained.report["missed_argmax"] < 0.05 < 0.5 < missed
    assert trained.report["recall"] == pytest.approx(PART.target_recall, abs=0.02)
    again = train(head, (fit, held, test), PART, seed=0)
    assert np.array_equal(again.up, trained.up) and again.threshold == trained.threshold


def test_the_report_counts_what_the_engine_would_lose(states) -> None:
    head, (_, _, test) = states
    down, up = np.eye(HIDDEN, dtype=np.float32), head  # scores are the logits
    logits = test @ head.T
    threshold = float(np.median(logits.max(axis=1)))
    found = evaluate(head, test, down, up, threshold, 1)
    missed = (logits.max(axis=1) <= threshold).mean()
    assert found["missed_argmax"] == pytest.approx(missed) and found["recall"] == pytest.approx(1 - missed)
    assert found["missed_argmax_low"] < missed < found["missed_argmax_high"]
    assert found["active_rows"] == pytest.approx((logits > threshold).mean())
    assert found["active_tiles"] == pytest.approx(
        (logits.reshape(len(test), -1, 16).max(2) > threshold).mean()
    )


def test_both_classes_weigh_the_same() -> None:
    scores = torch.zeros(2, 100)
    assert float(balanced_loss(scores, torch.tensor([[1], [2]]))) == pytest.approx(2 * np.log(2))
    right = torch.full((2, 100), -20.0).scatter(1, torch.tensor([[1], [2]]), 20.0)
    assert float(balanced_loss(right, torch.tensor([[1], [2]]))) < 1e-6


def test_windows_of_different_parts_share_no_text() -> None:
    streams = [np.arange(1000), np.arange(10_000, 10_500)]
    parts = split_windows(streams, 1200, 10, (0.5, 0.25, 0.25))
    assert sum(map(len, parts)) == 60 + 50
    tokens = [set(part.ravel().tolist()) for part in parts]
    assert not tokens[0] & tokens[1] and not tokens[1] & tokens[2]
    with pytest.raises(StageError, match="give more text or shorter windows"):
        split_windows([np.arange(15)], 1000, 10, (0.5, 0.5))


def test_collected_states_are_what_the_head_reads() -> None:
    torch.manual_seed(0)
    network = SmallThinkerForCausalLM(
        SmallThinkerConfig(hidden_size=32, num_hidden_layers=2, vocab_size=90, moe_ffn_hidden_size=32,
                           num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    ).eval()  # fmt: skip
    ids = np.random.default_rng(0).integers(0, 90, (3, 12))
    with torch.no_grad():
        expected = network(input_ids=torch.from_numpy(ids)).logits.flatten(0, 1).numpy()
    np.testing.assert_allclose(collect_states(network, ids) @ head_weight(network).T, expected, atol=1e-5)


def with_shards(inputs: dict[str, Path], folder: Path) -> dict[str, Path]:  # noqa: F811
    """The stage's inputs with held-out tokens beside the tokenizer."""
    tokenize = Path(shutil.copytree(inputs["tokenize"], folder / "tokenize"))
    ids = np.random.default_rng(0).integers(0, 700, 6000).astype("<u2")
    (tokenize / "shards").mkdir()
    ids.tofile(tokenize / "shards/a.ds")
    np.array([len(ids)], "<u8").tofile(tokenize / "shards/a.ds.index")
    entry = {"files": ["shards/a.ds"], "tokens": len(ids), "documents": 1, "bytes": 10}
    index = {"dtype": "uint16", "vocab_size": 704, "eos_id": 0, "splits": {"heldout": {"general": entry}}}
    (tokenize / "index.json").write_text(json.dumps(index))
    return {**inputs, "tokenize": tokenize}


def test_the_stage_writes_a_predictor_that_the_engine_runs(inputs, tmp_path: Path) -> None:  # noqa: F811
    given = with_shards(inputs, tmp_path)
    part = {"width": 32, "top_rows": 128, "positions": 2048, "window": 64, "steps": 5, "target_recall": 0.95}
    config = {"max_position_embeddings": 512, "verify_tokens": 96, "onnx": False, "head_predictor": part}
    out = tmp_path / "out"
    out.mkdir()
    context = StageContext("export", "toy", config, given, out, out)
    metrics = run(context)
    report = json.loads((out / "verification.json").read_text())["head_predictor"]
    assert metrics["head_predictor_missed_argmax"] == report["missed_argmax"]
    assert any("predictor of output rows" in note for note in context.notes)
    for kind in ("f32", "q4_0"):
        path = out / f"gguf/toy-{kind}.gguf"
        file = GGUFModel(path)
        assert file.precision("head_predictor.up.weight") == "Q4_0"
        down, up = (file.read(f"head_predictor.{name}.weight") for name in ("down", "up"))
        assert down.shape == (32, 64) and up.shape == (704, 32)
        assert np.array_equal(stored(up, GGMLQuantizationType.Q4_0), up)
        with Engine.open(path, head="predictor", sessions=1) as engine:
            info = engine.info.head_predictor
            assert info is not None and info.width == 32
            assert info.threshold == pytest.approx(report["threshold"])
            assert info.missed_argmax == pytest.approx(report["missed_argmax"])
            found = engine.logits(list(range(40)))
            share = engine.stats.head_row_share
        with Engine.open(path, sessions=1) as engine:
            exact = engine.logits(list(range(40)))
        named = ~np.isneginf(found)
        assert np.array_equal(found[named], exact[named]) and 0 < share < 1
    pack(out / "gguf/toy-q4_0.gguf", out / "packed.gguf")
    with Engine.open(out / "packed.gguf", head="predictor", sessions=1) as engine:
        assert engine.info.head_predictor is not None
        assert np.isneginf(engine.logits([1, 2, 3])).any()


def test_a_predictor_that_does_not_fit_is_refused(states) -> None:
    head, parts = states
    with pytest.raises(
        StageError, match=r"width is 128 and top_rows 32; the head has 64 columns and 1024 rows"
    ):
        train(head, tuple(parts), HeadPredictorConfig(), seed=0)


def test_the_default_recipes_and_their_fingerprints_know_nothing_of_it() -> None:
    assert ExportConfig().head_predictor is None
    assert "head_predictor" not in resolve("nano").part("export")
    part = resolve("nano", ['export.head_predictor={"width": 32}']).part("export")
    assert part["head_predictor"]["width"] == 32 and part["head_predictor"]["target_recall"] == 0.99
    assert ExportConfig.model_validate(part).head_predictor == HeadPredictorConfig(width=32)


def test_the_study_loses_nothing_where_its_bounds_are_rigorous(states) -> None:
    head, (fit, _, test) = states
    for screen in screens(head, fit):
        for line in measure(screen, head, test[:100], (3.0, 30.0)):
            if screen.bound or line["factor"] == 30.0:
                assert line["lost"] == 0, line
            assert line["tiles"] >= line["rows"] > 0
            assert line["lost_low"] <= line["lost"] <= line["lost_high"]
    report = study(head, fit, test, 64, 0)
    assert report["logits"]["positions"] == 64 and 0 < report["logits"]["cosine_p50"] <= 1
