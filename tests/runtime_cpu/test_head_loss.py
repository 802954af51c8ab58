"""The command that measures a predictor on text, against the engine's own predicted head and plain numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from runtime_cpu import Engine, EngineError, head, pack, synth
from runtime_cpu.head import LEAST_ROWS, measure, wilson
from runtime_cpu.synth import Shape

SHAPE = Shape("m", 2, 256, 4, 2, 64, 8, 2, 64, 2048, 512, 0, True, False)


@pytest.fixture(scope="module", params=["stock", "packed"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    synth.write(folder / "stock.gguf", SHAPE, head_share=0.2)
    if request.param == "packed":
        pack.pack(folder / "stock.gguf", folder / "packed.gguf")
    return folder / f"{request.param}.gguf"


IDS = np.random.default_rng(1).integers(0, SHAPE.vocab, 150)


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(odds / odds.sum(1, keepdims=True))


def test_it_says_what_the_engine_does(model: Path) -> None:
    with Engine.open(model, threads=1, sessions=1) as engine:
        exact = np.concatenate([engine.logits(part) for part in np.array_split(IDS, [64, 128])])
    with Engine.open(model, threads=1, sessions=1, head="predictor") as engine:
        found, computed, fallbacks = [], 0.0, 0
        for part in np.array_split(IDS, [64, 128]):
            found.append(engine.logits(part))
            computed += engine.stats.head_row_share * len(part)
            fallbacks += engine.stats.head_fallbacks
        (loss,) = measure(engine, IDS, window=64)
        # The engine is as it was.
        assert np.array_equal(engine.logits(IDS[:64]), found[0])
    lost = np.isneginf(np.concatenate(found))
    best = exact.argmax(1)
    assert loss.positions == len(IDS) and 0 < loss.fallbacks == fallbacks < len(IDS)
    assert loss.threshold == pytest.approx(engine.info.head_predictor.threshold)  # type: ignore[union-attr]
    assert loss.row_share == pytest.approx(computed / len(IDS)) == pytest.approx(1 - lost.mean())
    assert loss.missed_argmax == pytest.approx(lost[np.arange(len(best)), best].mean())
    assert 0.3 < loss.missed_argmax < 1  # a random predictor
    assert loss.lost_mass == pytest.approx(np.where(lost, softmax(exact), 0).sum(1).mean())
    assert loss.missed_argmax_low < loss.missed_argmax < loss.missed_argmax_high


def test_thresholds_trade_rows_for_misses(model: Path) -> None:
    with Engine.open(model, threads=1, sessions=1, head="predictor") as engine:
        losses = measure(engine, IDS[:40], [-1e9, 0.0, 1e9])
    assert (losses[0].row_share, losses[0].missed_argmax, losses[0].lost_mass) == (1.0, 0.0, 0.0)
    assert losses[0].missed_argmax_high == pytest.approx(0.0876, abs=1e-3)
    assert 0.4 < losses[1].row_share < 0.6 and losses[1].fallbacks == 0
    # Too few rows: the whole head, as the engine has it.
    assert (losses[2].row_share, losses[2].missed_argmax, losses[2].fallbacks) == (1.0, 0.0, 40)


def test_the_limit_is_the_cores(model: Path) -> None:
    text = (Path(__file__).parents[2] / "runtime_cpu/csrc/forward/head.hpp").read_text()
    assert f"kLeastHeadRows = {LEAST_ROWS};" in text


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 20)
    arguments = [str(model), str(text), "--threads", "1"]
    assert head.main([*arguments, "--positions", "30", "--window", "16"]) == 0
    assert "30 positions" in capsys.readouterr().out
    assert head.main([*arguments, "--positions", "9", "--json", "--thresholds", "-4", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [line["threshold"] for line in report] == [-4, 0] and report[0]["positions"] == 9
    synth.write(tmp_path / "without.gguf", SHAPE)
    (tmp_path / "empty.txt").write_text("")
    for wrong, message in (
        ([str(tmp_path / "without.gguf"), str(text)], "has no predictor of its head's rows"),
        ([str(model), str(tmp_path / "empty.txt")], "no tokens to measure on"),
        ([*arguments, "--positions", "0"], "--positions is 0"),
        ([*arguments, "--window", "0"], "window is 0"),
        ([*arguments, "--thresholds", "nan"], "allowed are finite numbers"),
        ([str(model), str(tmp_path / "none.txt")], "No such file"),
    ):
        assert head.main(wrong) == 2
        # Other packages may log to the same place.
        (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert message in said


def test_an_exact_head_is_not_measured(model: Path) -> None:
    with Engine.open(model, threads=1, sessions=1) as engine:
        with pytest.raises(ValueError, match="open it with head='predictor'"):
            measure(engine, IDS)
        with pytest.raises(EngineError, match="head rows are 'some'"), engine.head_rows("some"):
            pass


def test_wilson_agrees_with_the_textbook() -> None:
    assert wilson(0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert wilson(13, 100) == pytest.approx((0.0776, 0.2098), abs=1e-4)
