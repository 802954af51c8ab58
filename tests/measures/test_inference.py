"""Option scores and greedy decoding against the plain forward pass, one sequence at a time."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.measures.inference import greedy_tokens, option_scores
from model import SmallThinkerForCausalLM
from tests.evaluation.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> SmallThinkerForCausalLM:
    return tiny_model()


def plain_score(model: SmallThinkerForCausalLM, context: list[int], option: list[int]) -> tuple[float, bool]:
    """Reference: one forward over the whole sequence, no cache, no padding."""
    with torch.no_grad():
        logits = model(torch.tensor([context + option]), use_cache=False).logits[0, len(context) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    target = torch.tensor(option)
    return float(logprobs.gather(1, target[:, None]).sum()), bool((logprobs.argmax(-1) == target).all())


def plain_greedy(model: SmallThinkerForCausalLM, prompt: list[int], count: int, stops: set[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def sequence(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(259), k=length)


# Context lengths around the window (16), ragged options, one-token options, one single option.
CASES = [
    (1, [1, 1, 1]),
    (15, [1, 4]),
    (16, [3, 1, 9]),
    (17, [2]),
    (40, [1, 1]),
    (7, [20, 2]),
    (33, [5, 5, 5, 5]),
]


@pytest.mark.parametrize("batch_size", [1, 5, 128])
def test_option_scores_equal_the_plain_forward(model: SmallThinkerForCausalLM, batch_size: int) -> None:
    contexts = [sequence(length, i) for i, (length, _) in enumerate(CASES)]
    options = [[sequence(n, 100 * i + j) for j, n in enumerate(sizes)] for i, (_, sizes) in enumerate(CASES)]
    seen: list[int] = []
    scored = option_scores(model, contexts, options, batch_size, progress=seen.append)
    assert sum(seen) == sum(len(choices) for choices in options)
    for context, choices, scores in zip(contexts, options, scored, strict=True):
        for choice, score in zip(choices, scores, strict=True):
            logprob, is_greedy = plain_score(model, context, choice)
            assert score.logprob == pytest.approx(logprob, abs=2e-4)
            assert score.is_greedy == is_greedy


def test_greedy_options_are_recognised(model: SmallThinkerForCausalLM) -> None:
    context = sequence(20, 5)
    best = plain_greedy(model, context, 4, set())
    wrong = [*best[:3], (best[3] + 1) % 259]
    scores = option_scores(model, [context], [[best, wrong]])[0]
    assert [score.is_greedy for score in scores] == [True, False]


def test_long_contexts_lose_their_left(model: SmallThinkerForCausalLM) -> None:
    context, option = sequence(60, 1), sequence(6, 2)
    score = option_scores(model, [context], [[option]], max_length=32)[0][0]
    logprob, _ = plain_score(model, context[-(32 - 6 + 1) :], option)
    assert score.logprob == pytest.approx(logprob, abs=2e-4)


def test_impossible_requests_are_named(model: SmallThinkerForCausalLM) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        option_scores(model, [[]], [[[1]]])
    with pytest.raises(ValueError, match="at least one token"):
        option_scores(model, [[1]], [[[]]])
    with pytest.raises(ValueError, match="does not fit"):
        option_scores(model, [[1]], [[[1] * 9]], max_length=8)
    with pytest.raises(ValueError, match="max_new_tokens"):
        greedy_tokens(model, [[1]], 512, [])
    assert option_scores(model, [], []) == []
    assert option_scores(model, [[1], [2]], [[], [[3]]])[0] == []


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    batch_size=st.integers(1, 5),
)
def test_greedy_tokens_equal_the_plain_forward(lengths: list[int], seed: int, batch_size: int) -> None:
    model = tiny_model()
    prompts = [sequence(length, seed + i) for i, length in enumerate(lengths)]
    free = [plain_greedy(model, prompt, 12, set()) for prompt in prompts]
    stop = free[0][3]  # a token that really occurs, so that sequences leave the batch at different steps
    expected = [plain_greedy(model, prompt, 12, {stop}) for prompt in prompts]
    assert greedy_tokens(model, prompts, 12, [stop], batch_size) == expected


def test_stop_rule_ends_a_sequence_after_its_token(model: SmallThinkerForCausalLM) -> None:
    prompts = [sequence(5, 1), sequence(9, 2)]
    out = greedy_tokens(model, prompts, 10, [], is_finished=lambda tokens: len(tokens) == 3)
    assert out == [plain_greedy(model, prompt, 3, set()) for prompt in prompts]
