"""Whether a rewrite still tells what its source tells, without asking a model: ``compare(source, rewrite)``.

An offline stand-in for MGA's judge of limited consistency (arXiv:2502.04235, section 3): omissions and changes of
style are free, a text that cannot be recognised or that invents its facts is not, and a copy is no rewrite.
Measured thresholds: docs/synthesis.md.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

from components.synthesis.config import FilterConfig
from components.synthesis.texts import content_words, ngrams, numbers, words

_COPY_NGRAM: Final = 5
_RELATIONS: Final = frozenset(
    """
    half twice thrice double triple quarter third fourth fifth times fewer less more than each per every
    total left remaining remain percent average another additional increase decrease older younger two three
    four five six seven eight nine ten eleven twelve dozen hundred thousand
    """.split()  # noqa: SIM905
)
_EQUATION: Final = re.compile(
    r"[$€£]?\d[\d.,/%]*(?:\s*[-+x×*/]\s*[$€£]?\d[\d.,/%]*)+\s*=\s*[$€£]?\d(?:[\d.,/]*\d)?%?"
)


@dataclass(frozen=True)
class Comparison:
    """A rewrite beside its source; all shares lie in [0, 1].

    Attributes:
        shared: share of the source's content words that the rewrite keeps.
        grounded: share of the rewrite's content words that the source holds.
        copied: share of the rewrite's word 5-grams that the source holds.
        new_numbers: share of the rewrite's numbers that the source lacks.
    """

    shared: float
    grounded: float
    copied: float
    new_numbers: float

    def problem(self, limits: FilterConfig) -> str | None:
        """The reason to reject the rewrite, or ``None``."""
        if self.copied > limits.max_copied:
            return "copied"
        if self.shared < limits.min_shared:
            return "unrelated"
        if self.grounded < limits.min_grounded:
            return "ungrounded"
        if self.new_numbers > limits.max_new_numbers:
            return "new_numbers"
        return None


def compare(source: str, rewrite: str) -> Comparison:
    """Measure how a rewrite relates to its source."""
    theirs, ours = content_words(source), content_words(rewrite)
    common = len(theirs & ours)
    grams = ngrams(rewrite, _COPY_NGRAM)
    known, stated = numbers(source), numbers(rewrite)
    new = sum(count for number, count in stated.items() if number not in known)
    return Comparison(
        shared=common / len(theirs) if theirs else 0.0,
        grounded=common / len(ours) if ours else 0.0,
        copied=len(grams & ngrams(source, _COPY_NGRAM)) / len(grams) if grams else 0.0,
        new_numbers=new / stated.total() if stated else 0.0,
    )


def same_problem(original: str, retold: str) -> str | None:
    """Why a retold maths problem may have another answer, or ``None``.

    Every number must occur as often as before, and so must every word that relates numbers ("fewer", "each", "half").
    Strict on purpose: a good retelling that says "per" for "each" is lost, a wrong answer is not let in.
    """
    if numbers(original) != numbers(retold):
        return "numbers_changed"
    if relations(original) != relations(retold):
        return "relations_changed"
    if not retold.rstrip().endswith("?"):
        return "no_question"
    return None


def relations(text: str) -> Counter[str]:
    """Words that relate numbers, and numbers in words, with their counts."""
    return Counter(word for word in words(text) if word in _RELATIONS)


def equations(solution: str) -> list[str]:
    """The calculations of a worked solution, in order: ``["22 + 13 = 35", …]``; they survive a change of story."""
    return [match.group().strip() for match in _EQUATION.finditer(solution)]
