"""Which filters apply to which kind of text: ``filters("web", tools)`` lists datatrove steps in order.

Gopher's, C4's and FineWeb's rules were made for English web prose. Elsewhere they are loosened or left out, as the
table in docs/data.md says; code and generated text have rules of their own.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datatrove.data import Document  # type: ignore[import-untyped]
from datatrove.pipeline.base import PipelineStep  # type: ignore[import-untyped]
from datatrove.pipeline.filters import (  # type: ignore[import-untyped]
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter  # type: ignore[import-untyped]
from datatrove.utils.word_tokenizers import WordTokenizer  # type: ignore[import-untyped]

from components.corpus.languages import CHINESE, ENGLISH, SPACES, LocalLanguageModel
from components.curation.config import PolicyName

EXTRACTION_TIMEOUT_S = 60.0  # generous: a limit that a busy machine could reach would make the output vary
_CHINESE_STOP_WORDS = ["的", "了", "在", "是", "和", "不", "有", "之", "为", "以", "可以", "也"]


class CodeFilter(BaseFilter):  # type: ignore[misc]
    """StarCoder's rules for source files: line lengths, share of alphanumeric characters; Python must parse."""

    name = "Code rules"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep ``doc``, with the reason when not."""
        text = doc.text
        lines = text.splitlines() or [""]
        if max(map(len, lines)) > 1_000:
            return False, "line_over_1000_characters"
        if len(text) / len(lines) > 100:
            return False, "mean_line_over_100_characters"
        if sum(map(str.isalnum, text)) < 0.25 * len(text):
            return False, "few_alphanumeric_characters"
        if doc.metadata.get("python"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ast.parse(text)
            except (SyntaxError, ValueError, RecursionError):
                return False, "python_does_not_parse"
        return True


class ChineseShareFilter(BaseFilter):  # type: ignore[misc]
    """Keeps texts of which at least a share of the characters is Chinese."""

    name = "Chinese share"

    def __init__(self, least: float):
        super().__init__()
        self.least = least

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep ``doc``, with the reason when not."""
        characters = [character for character in doc.text if not character.isspace()]
        chinese = sum("\u4e00" <= character <= "\u9fff" for character in characters)
        return (
            True if characters and chinese >= self.least * len(characters) else (False, "too_little_chinese")
        )


@dataclass(frozen=True)
class Policy:
    """How one kind of text is judged.

    Attributes:
        language: language it must be in, none when identification does not apply.
        quality: what scores it: a trained classifier, code's own rules, or nothing for text made by construction.
        overlap: how evaluation items are matched: by n-grams, or (templated text, whose templates the evaluation
            shares on purpose) by the whole question.
        minhash: whether near-duplicates are dropped.
        rules: makes the heuristic filters.
    """

    language: Literal["en", "zh"] | None
    quality: Literal["en", "zh", "code", "none"]
    overlap: Literal["ngrams", "question"]
    minhash: bool
    rules: Callable[[], list[PipelineStep]]

    @property
    def words(self) -> WordTokenizer:
        """The word tokenizer for n-grams of simplified text, which has no punctuation left."""
        return CHINESE if self.quality == "zh" else SPACES


def _web() -> list[PipelineStep]:
    return [
        GopherRepetitionFilter(language=ENGLISH),
        GopherQualityFilter(min_doc_words=40, language=ENGLISH),
        C4QualityFilter(filter_no_terminal_punct=False, min_num_sentences=3, language=ENGLISH),
        FineWebQualityFilter(line_punct_exclude_zero=True, language=ENGLISH),
    ]


def _encyclopedia() -> list[PipelineStep]:
    return [
        GopherRepetitionFilter(language=ENGLISH),
        GopherQualityFilter(min_doc_words=25, max_non_alpha_words_ratio=0.7, language=ENGLISH),
        C4QualityFilter(filter_no_terminal_punct=False, min_num_sentences=2, language=ENGLISH),
        FineWebQualityFilter(line_punct_exclude_zero=True, language=ENGLISH),
    ]


def _technical() -> list[PipelineStep]:
    loose = ((5, 0.30), (6, 0.28), (7, 0.26), (8, 0.24), (9, 0.22), (10, 0.20))
    return [
        GopherRepetitionFilter(
            dup_line_frac=0.4, dup_line_char_frac=0.3, dup_n_grams=loose, language=ENGLISH
        ),
        GopherQualityFilter(
            min_doc_words=40, min_avg_word_length=2, max_non_alpha_words_ratio=0.55, language=ENGLISH
        ),
        FineWebQualityFilter(
            line_punct_thr=0.08,
            short_line_thr=0.8,
            char_duplicates_ratio=0.15,
            new_line_ratio=0.5,
            language=ENGLISH,
        ),
    ]


def _chinese() -> list[PipelineStep]:
    loose = ((5, 0.30), (6, 0.28), (7, 0.26), (8, 0.24), (9, 0.22), (10, 0.20))
    return [
        ChineseShareFilter(0.2),
        GopherRepetitionFilter(
            dup_line_frac=0.4, dup_line_char_frac=0.3, dup_n_grams=loose, language=CHINESE
        ),
        GopherQualityFilter(
            min_doc_words=40,
            min_avg_word_length=1,
            max_non_alpha_words_ratio=0.5,
            stop_words=_CHINESE_STOP_WORDS,
            language=CHINESE,
        ),
        FineWebQualityFilter(
            line_punct_thr=0.05,
            short_line_thr=0.9,
            short_line_length=10,
            char_duplicates_ratio=0.2,
            new_line_ratio=0.5,
            language=CHINESE,
        ),
    ]


POLICIES: dict[PolicyName, Policy] = {
    "web": Policy("en", "en", "ngrams", True, _web),
    "encyclopedia": Policy("en", "en", "ngrams", True, _encyclopedia),
    "technical": Policy("en", "en", "ngrams", True, _technical),
    "generated": Policy(None, "none", "question", False, list),
    "code": Policy(None, "code", "ngrams", True, lambda: [CodeFilter()]),
    "chinese": Policy("zh", "zh", "ngrams", True, _chinese),
    "chinese_short": Policy(None, "zh", "ngrams", True, lambda: [ChineseShareFilter(0.5)]),
}


def language(policy: Policy, model: Path, threshold: float) -> list[PipelineStep]:
    """The language filter of a policy, or nothing."""
    if policy.language is None:
        return []
    step = LanguageFilter([policy.language], language_threshold=threshold)
    step.model = LocalLanguageModel([policy.language], model)
    return [step]
