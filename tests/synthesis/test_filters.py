"""Filters as properties: what must always be rejected, what never, and what the consistency check can tell apart."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.synthesis import SynthesizeConfig
from components.synthesis.filters.answers import AnswerFilter, degenerates
from components.synthesis.filters.consistency import compare, equations, same_problem
from components.synthesis.filters.duplicates import NearDuplicates, signature
from components.synthesis.items import repeats_prompt
from components.synthesis.prompts import pairs
from components.synthesis.texts import ngrams

from .conftest import CHINESE, sentences
from .teacher_app import rewritten

LIMITS = SynthesizeConfig().filters
PROSE = (
    "The harvest came late that year, because the winter had been long and the meadow stood under water until May.",
    "A weaver from the village kept her copper kettle beside the window and watched the railway being built.",
    "Nobody at the museum could say who had drawn the compass, or why its needle pointed towards the orchard.",
    "When the captain returned, every lantern on the bridge was lit and the market stayed open past midnight.",
    "Granite is hard to cut, so the teacher asked for pottery instead and the children were glad of it.",
    "Two engines pulled the wheat up the mountain; a third waited in the harbour with its fires banked.",
)
SEEDS = st.integers(0, 10_000)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("I'm sorry, but I cannot rewrite a text about rivers and bridges for you today.", "refusal"),
        ("The river is wide. As an AI language model, I like the river and the old bridge.", "refusal"),
        ("A river is wide. Answer with the new text only. The bridge near the river is old.", "prompt_leak"),
        ("%% $$ ## @@ 12 34 -- ++ %% $$ ## @@ 12 34", "noise"),
        ("The river \ufffd near the bridge", "noise"),
        ("A short one.", "too_short"),
    ],
)
def test_reasons(answers: AnswerFilter, text: str, reason: str) -> None:
    assert answers.problem(text, least_words=5) == reason


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_good_english_passes_and_chinese_does_not(answers: AnswerFilter, seed: int) -> None:
    generator = random.Random(seed)
    english = " ".join(generator.sample(PROSE, 3))
    assert answers.problem(english, least_words=5, language="en") is None
    chinese = "".join(generator.sample(CHINESE, 36)) + "。"
    assert answers.problem(chinese, least_words=5, language="en") in ("language", "repetition")


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(3, 9))
def test_loops_are_always_found(seed: int, size: int, times: int) -> None:
    generator = random.Random(seed)
    start = sentences(generator, 2)
    block = [f"word{chr(97 + i)}" for i in range(size)]
    loop = " ".join(block * (times if size > 1 else max(times, 5)))
    assert degenerates(f"{start} {loop}")
    assert not degenerates(start)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_consistency_tells_a_rewrite_from_a_copy_and_a_stranger(seed: int) -> None:
    generator = random.Random(seed)
    source = sentences(generator, 6)
    other = (
        "Quantum cryptography distributes secret keys through polarised photons; eavesdroppers disturb them."
    )
    assert compare(source, rewritten(source)).problem(LIMITS) is None
    assert compare(source, source).problem(LIMITS) == "copied"
    assert compare(source, other).problem(LIMITS) == "unrelated"
    invented = rewritten(source).replace("In 1", "In 7")
    assert compare(source, invented).new_numbers > 0


@given(st.text(max_size=120), st.text(max_size=120))
def test_shares_lie_between_0_and_1(a: str, b: str) -> None:
    found = compare(a, b)
    for share in (found.shared, found.grounded, found.copied, found.new_numbers):
        assert 0 <= share <= 1


PROBLEM = "Ann has 12 apples and gives 3 to each of her 2 friends. How many apples are left?"


@pytest.mark.parametrize(
    ("retold", "reason"),
    [
        ("A baker has 12 rolls and hands 3 to each of 2 guests. How many rolls are left?", None),
        ("A baker has 12 rolls and hands 4 to each of 2 guests. How many rolls are left?", "numbers_changed"),
        ("A baker has 12 rolls and hands 3 to his 2 guests. How many rolls are left?", "relations_changed"),
        ("A baker has 12 rolls and hands 3 to each of 2 guests. So 6 are left?", "numbers_changed"),
        ("A baker has 12 rolls and hands 3 to each of 2 guests. The rolls are left.", "no_question"),
        (
            "A baker has 12 rolls and hands 3 to each of two guests. How many rolls are left?",
            "numbers_changed",
        ),
    ],
)
def test_same_problem(retold: str, reason: str | None) -> None:
    assert same_problem(PROBLEM, retold) == reason


def test_equations() -> None:
    worked = "He sold 22 + 13 = 35 boxes.\nThey cost 57 x €11 = €627.\nSo 12,000 - 3.5 = 11,996.5.\n#### 1"
    assert equations(worked) == ["22 + 13 = 35", "57 x €11 = €627", "12,000 - 3.5 = 11,996.5"]
    assert equations("half * 186 ladybugs = 93") == []


def test_prompt_descriptions_are_found_unless_the_source_has_them() -> None:
    pair = next(pair for pair in pairs() if pair.genre == "news")
    leak = "The river rose. It opens with the most important fact and adds the details."
    assert repeats_prompt(leak, "The river rose.", pair)
    assert not repeats_prompt(leak, leak, pair)
    assert not repeats_prompt("The river rose by a metre on Monday night.", "The river rose.", pair)


@settings(max_examples=40, deadline=None)
@given(SEEDS, SEEDS)
def test_minhash_estimates_jaccard(first: int, second: int) -> None:
    a = sentences(random.Random(first), 5)
    b = a[: len(a) // 2] + sentences(random.Random(second), 3)
    grams_a, grams_b = ngrams(a, 5), ngrams(b, 5)
    exact = len(grams_a & grams_b) / len(grams_a | grams_b)
    estimate = float((signature(a) == signature(b)).mean())
    assert abs(exact - estimate) < 0.3  # 64 permutations: standard error at most 0.0625


def test_near_duplicates() -> None:
    seen = NearDuplicates(0.7)
    text = sentences(random.Random(5), 8)
    assert seen.add(text)
    assert not seen.add(text)
    assert not seen.add(text.replace("In 1", "In  1") + " The end.")
    assert seen.add(sentences(random.Random(6), 8))
    assert seen.add("") and not seen.add("")
