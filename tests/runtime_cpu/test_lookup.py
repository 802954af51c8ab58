"""Prompt lookup changes speed, never the output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_cpu import Engine
from runtime_cpu.engine.lookup import MOST_DRAFTED, Pace, PromptLookup
from tests.runtime_cpu.small_models import Shape, random_weights, write_model

GOLDEN = Path(__file__).parent.parent / "golden" / "gguf"


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 8))
def test_a_draft_is_what_followed_the_longest_last_run(tokens: list[int], most: int) -> None:
    draft = PromptLookup(tokens).draft(most)
    expected: list[int] = []
    for size in (4, 3, 2):
        if len(tokens) < size:
            continue
        run = tokens[-size:]
        places = [i for i in range(size, len(tokens)) if tokens[i - size : i] == run]
        if places:
            expected = tokens[places[-1] : places[-1] + most]
            break
    assert draft == expected


def test_drafting_stops_when_it_costs_more_than_it_brings() -> None:
    pace = Pace()
    assert not pace.wants_draft()  # nothing to compare with
    pace.record(0, 1, 1.0)
    assert pace.wants_draft()
    pace.record(6, 4, 2.0)  # half a second a token
    assert pace.wants_draft()
    for _ in range(20):
        pace.record(6, 1, 3.0)
    assert not any(pace.wants_draft() for _ in range(40))
    assert any(pace.wants_draft() for _ in range(40)), "it never tries again"


@pytest.fixture(scope="module", params=["global", "windowed"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Small vocabularies repeat themselves: drafts are made and refused all the time."""
    shape = Shape(
        layers=3, hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=32, vocab=12, context=400
    )
    if request.param == "windowed":
        shape = Shape(**{**vars(shape), "window": 9, "rope": (0, 1, 1), "windowed": (0, 1, 1)})
    path = write_model(
        tmp_path_factory.mktemp("lookup") / "model.gguf", shape, random_weights(shape, 5), "Q4_0"
    )
    with Engine.open(path, threads=2, context=400, chunk_tokens=8) as opened:
        yield opened


class _Eager(Pace):
    def wants_draft(self) -> bool:
        return True


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 11), min_size=1, max_size=30),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    penalty=st.sampled_from([0.0, 0.6]),
    count=st.integers(1, 60),
)
def test_the_output_is_the_same_with_and_without(
    engine: Engine, prompt: list[int], temperature: float, penalty: float, count: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime_cpu.engine.decoding.Pace", _Eager)
        runs = []
        for lookup in (False, True):
            generation = engine.generate(
                prompt,
                count,
                temperature=temperature,
                frequency_penalty=penalty,
                seed=4,
                stop_ids=[3],
                logprobs=2,
                lookup=lookup,
            )
            runs.append(list(generation))
            stats = generation.stats
            assert stats.generated_tokens == len(runs[-1]) <= count
            assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
        assert runs[0] == runs[1]
    # What is kept of the sequence is what was generated: the next request builds on it.
    following = prompt + [token.id for token in runs[0]]
    assert np.array_equal(engine.logits(following[-20:]), engine.logits(following[-20:]))


def test_copying_is_drafted(engine: Engine) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime_cpu.engine.decoding.Pace", _Eager)
        generation = engine.generate([1, 2, 3, 4, 5, 6, 7] * 8, 200, stop_ids=(), lookup=True)
        tokens = [token.id for token in generation]
    stats = generation.stats
    assert stats.accepted_tokens > 20, "greedy decoding of a tiny model repeats itself"
    assert stats.decode_steps + stats.accepted_tokens == len(tokens) - 1
    assert stats.drafted_tokens <= MOST_DRAFTED * stats.decode_steps
