"""Sequences that decode together get the bits that each would get alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from runtime_cpu import Engine, EngineError
from runtime_cpu.batching import Batcher
from tests.runtime_cpu.small_models import Shape, random_weights, write_model
from tests.waiting import wait_for

GOLDEN = Path(__file__).parent.parent / "golden" / "gguf"


@pytest.fixture(scope="module", params=["Q4_0", "F32"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(
        layers=4, hidden=256, heads=4, head_dim=64, experts=8, used=3, expert_hidden=256, vocab=500, window=40,
        rope=(0, 1, 1, 1), windowed=(0, 1, 1, 1), context=512,
    )  # fmt: skip
    return write_model(
        tmp_path_factory.mktemp("batch") / "model.gguf", shape, random_weights(shape), request.param
    )


def answers(engine: Engine, together: int) -> tuple[list[list[tuple[int, float]]], list[dict[str, object]]]:
    """What six prompts of different lengths bring, decoded by so many threads; six begin together."""
    stats = []
    begin = threading.Barrier(together + 1)

    def ask(number: int) -> list[tuple[int, float]]:
        prompt = [(7 * number + i) % 500 for i in range(3 + 11 * number)]
        generation = engine.generate(
            prompt, 20 + 6 * number, temperature=0.8, seed=number, stop_ids=(), lookup=number % 2 == 0
        )
        tokens = []
        if together > 1:
            tokens = [next(generation)]
            begin.wait()
        tokens = [(token.id, token.logprob) for token in (*tokens, *generation)]
        stats.append({"number": number, "counts": generation.stats.expert_counts, "tokens": len(tokens)})
        return tokens

    with ThreadPoolExecutor(together) as pool:
        answering = [pool.submit(ask, number) for number in range(6)]
        if together > 1:
            # Nobody computes until the three that guess nothing are there, so that they are computed together.
            wait_for(lambda: begin.n_waiting == together, "the first tokens")
            with engine._compute_lock:
                begin.wait()
                wait_for(lambda: len(engine._batcher._waiting) >= 3, "steps to compute together")
        return [answer.result() for answer in answering], stats


def test_together_is_the_same_as_alone(model: Path) -> None:
    with Engine.open(model, threads=2, context=200, sessions=6) as engine:
        alone, _ = answers(engine, 1)
        assert engine._batcher.largest == 1
        together, stats = answers(engine, 6)
        assert together == alone
        assert engine._batcher.largest > 1, "nothing was ever computed together"
        for one in stats:  # every layer of every token has chosen its three experts, whoever ran beside it
            counts = np.asarray(one["counts"])
            assert len(set(counts.sum(1))) == 1 and counts.sum() % (4 * 3) == 0


def test_a_failing_pass_fails_only_whom_it_concerns() -> None:
    calls: list[list[int]] = []

    def decode(sessions: object, ids: np.ndarray, logits: np.ndarray) -> None:
        calls.append(ids.tolist())
        if 13 in ids:
            raise EngineError("the disk has had enough")
        logits[:] = ids[:, None]

    class Session:
        pass

    lock = threading.Lock()
    batcher = Batcher(lock, decode, most=4)  # type: ignore[arg-type]
    failures: list[int] = []

    def run(number: int) -> None:
        session, row = Session(), np.zeros((1, 3), np.float32)
        for token in (number, 13 if number == 2 else number + 100, number + 200):
            try:
                batcher.step(session, token, row)  # type: ignore[arg-type]
            except EngineError:
                failures.append(token)
                continue
            assert (row == token).all()
        batcher.leave(session)  # type: ignore[arg-type]

    with ThreadPoolExecutor(6) as pool:
        with lock:
            running = [pool.submit(run, number) for number in range(6)]
            wait_for(lambda: len(batcher._waiting) == 6, "six steps")
        for one in running:
            one.result()
    assert failures == [13]
    assert max(map(len, calls)) <= 4 and any(len(call) > 1 for call in calls)


def test_a_sequence_that_pauses_holds_nobody(model: Path) -> None:
    with Engine.open(model, threads=2, context=200, sessions=2) as engine:
        paused = engine.generate([1, 2, 3], 50, stop_ids=(), lookup=False)
        next(paused)
        next(paused)
        assert len(list(engine.generate([4, 5], 60, stop_ids=(), lookup=False))) == 60
        assert len(list(paused)) == 48
