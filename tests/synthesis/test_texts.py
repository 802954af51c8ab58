"""Cleaning, cutting and counting of texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.synthesis.items import _first_question
from components.synthesis.personas import read_persona
from components.synthesis.texts import (
    clean,
    content_words,
    excerpt,
    first_sentence,
    ngrams,
    numbers,
    whole_sentences,
    words,
)

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Sure! Here is the rewritten text:\n\nThe sea is wide.", "The sea is wide."),
        ("Here's a short letter for farmers: The sea is wide.", "The sea is wide."),
        ("**Answer:** The sea is wide.", "The sea is wide."),
        ('"The sea is wide."', "The sea is wide."),
        ("```text\nThe sea is wide.\n```", "The sea is wide."),
        ('"Yes," he said. "No," she said.', '"Yes," he said. "No," she said.'),
        ("The text: a study of signs.", "The text: a study of signs."),
        ("Surely the sea is wide. It ends: here.", "Surely the sea is wide. It ends: here."),
        ("", ""),
        ("``````", "``````"),
    ],
)
def test_clean(answer: str, expected: str) -> None:
    assert clean(answer) == expected


@given(TEXTS)
def test_clean_only_removes(text: str) -> None:
    assert clean(text) in text


@given(TEXTS, st.integers(10, 200))
def test_excerpt_is_a_beginning_within_the_limit(text: str, limit: int) -> None:
    cut = excerpt(text, limit)
    assert len(cut) <= limit and text.strip().startswith(cut)


def test_excerpt_keeps_whole_sentences() -> None:
    text = "The first sentence stands here. The second one is a bit longer. The third is cut"
    assert excerpt(text, 70) == "The first sentence stands here. The second one is a bit longer."
    assert excerpt("It costs 3.14159265 euros and a lot of patience", 10) == "It costs"
    assert excerpt("河流很长。山很高。还有很多", 10) == "河流很长。山很高。"


@given(TEXTS)
def test_whole_sentences_is_stable(text: str) -> None:
    once = whole_sentences(text)
    assert text.startswith(once) and whole_sentences(once) == once


def test_first_sentence() -> None:
    assert first_sentence("\n\nA man walks. He stops.") == "A man walks."
    assert first_sentence("no end here") == "no end here"
    assert first_sentence("") == ""


def test_numbers_level_their_form() -> None:
    assert numbers("1,200 and 1200.50 or 007") == {"1200": 1, "1200.5": 1, "7": 1}
    assert numbers("3, 4,5") == {"3": 1, "4": 1, "5": 1}
    assert numbers("0 and 0.0") == {"0": 2}


def test_words_and_content() -> None:
    assert words("Don't stop, 河流!") == ["don't", "stop", "河", "流"]
    assert content_words("There would be engines and engineers") == {"engine"}
    assert content_words("河流很长") == {"河流", "流很", "很长"}


@given(TEXTS, st.integers(1, 6))
def test_ngrams_cover_the_words(text: str, size: int) -> None:
    assert {word for gram in ngrams(text, size) for word in gram} == set(words(text))


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("What is tin?", "What is tin?"),
        ("1. what is tin? 2. What is lead?", "What is tin?"),
        ('The person would ask: "How do I solder tin?"', "How do I solder tin?"),
        ("I'd ask, 'Is tin soft?'", "Is tin soft?"),
        ("Tin is soft.", ""),
        ("", ""),
        ("\n\n- Who mines tin?\nNobody.", "Who mines tin?"),
    ],
)
def test_first_question(answer: str, question: str) -> None:
    assert _first_question(answer) == question


def test_read_persona() -> None:
    assert read_persona("A nurse who reads old maps. She is kind.") == "A nurse who reads old maps."
    assert (
        read_persona("The text is about maps.") is not None
    )  # a sentence; the question must then make sense
    assert read_persona("Nurses read maps in the evening.") is None
    assert read_persona("A nurse.") is None
    assert read_persona("") is None
