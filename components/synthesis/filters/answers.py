"""Filters of single answers: ``AnswerFilter(config, language_model).problem(text)`` names the reason or ``None``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, Literal

from components.synthesis.config import FilterConfig
from components.synthesis.texts import words

Language = Literal["en", "zh"]

_REFUSAL_START: Final = re.compile(
    r"i(?:'m| am) (?:sorry|unable|not able|afraid)|i (?:cannot|can't|can not|won't|apologi[sz]e|don't have)|"
    r"unfortunately,? i|please provide|could you (?:please )?(?:provide|clarify)|抱歉|对不起|我无法|我不能",
    re.IGNORECASE,
)
_SELF_MENTION: Final = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|virtual assistant)\b|\bsmollm|"
    r"\bi(?:'m| am) an? (?:ai|artificial|language model)|作为(?:一个|一名)?(?:人工智能|AI|语言模型)",
    re.IGNORECASE,
)
_LEAK: Final = re.compile(
    r"\b(?:rewrite the text|keep its names|answer with the (?:new text|problem|question) only|"
    r"rewritten (?:text|version)|here is a person|retell the maths problem|"
    r"ends? with a question mark)\b|<\|im_(?:start|end)\|>",
    re.IGNORECASE,
)
_REFUSAL_REGION_CHARS: Final = 160
_LEAST_TEXT_SHARE: Final = 0.6  # letters and spaces among characters


class AnswerFilter:
    """Degeneration, language and refusals, on datatrove's filters where it has them.

    Args:
        language_model: fastText's ``lid.176.ftz``.
    """

    def __init__(self, config: FilterConfig, language_model: Path):
        from datatrove.pipeline.filters import GopherRepetitionFilter  # type: ignore[import-untyped]

        from components.corpus.languages import LocalLanguageModel

        self._config = config
        self._identify: Any = LocalLanguageModel(["en", "zh"], language_model)
        self._repetition: dict[Language, Any] = {
            "en": GopherRepetitionFilter(language="eng"),
            "zh": GopherRepetitionFilter(language="cmn_Hani"),
        }

    def problem(
        self, text: str, *, least_words: int, most_words: int | None = None, language: Language = "en"
    ) -> str | None:
        """The first reason to reject an answer: ``empty``, ``refusal``, ``too_short``, ``repetition``, ….

        Args:
            text: the answer, cleaned.
            least_words: shorter ones are ``too_short``.
            most_words: longer ones are ``too_long``.
            language: the language that it should be in; judged from ten words on.
        """
        if not text:
            return "empty"
        if _REFUSAL_START.search(text[:_REFUSAL_REGION_CHARS]) or _SELF_MENTION.search(text):
            return "refusal"
        if _LEAK.search(text):
            return "prompt_leak"
        if is_noise(text):
            return "noise"
        count = len(words(text))
        if count < least_words:
            return "too_short"
        if most_words is not None and count > most_words:
            return "too_long"
        if self._repeats(text, language):
            return "repetition"
        if count >= 10 and self.language_score(text, language) < self._config.language_threshold:
            return "language"
        return None

    def language_score(self, text: str, language: Language) -> float:
        """fastText's probability that ``text`` is in ``language``."""
        _, scores = self._identify.predict(_document(text))
        return float(scores[language])

    def _repeats(self, text: str, language: Language) -> bool:
        if degenerates(text):
            return True
        if len(words(text)) < 20:  # Gopher's rules were made for documents; a short text is always repetitive
            return False
        return self._repetition[language].filter(_document(text)) is not True


def is_noise(text: str) -> bool:
    """Whether a text is mostly something other than letters, digits and ordinary punctuation."""
    fine = sum(character.isalpha() or character.isspace() for character in text)
    broken = text.count("\ufffd")
    return broken > 0 or fine < _LEAST_TEXT_SHARE * len(text)


def degenerates(text: str) -> bool:
    """Whether a text loops: a word five times in a row, or a block of words three times in a row."""
    found = words(text)
    if any(len(set(found[i : i + 5])) == 1 for i in range(len(found) - 4)):
        return True
    for size in range(2, min(40, len(found) // 3) + 1):
        same = 0  # words in a row that equal the one a block earlier
        for position in range(size, len(found)):
            same = same + 1 if found[position] == found[position - size] else 0
            if same >= 2 * size:
                return True
    return False


def _document(text: str) -> Any:
    from datatrove.data import Document  # type: ignore[import-untyped]

    return Document(text=text, id="")
