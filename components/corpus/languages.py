"""Words and languages of text, by datatrove: ``ENGLISH.word_tokenize(text)``, ``LocalLanguageModel(["en"], path)``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

from datatrove.utils.lid import FastTextLID  # type: ignore[import-untyped]
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer  # type: ignore[import-untyped]


class RememberingTokenizer(WordTokenizer):  # type: ignore[misc]
    """datatrove's word tokenizer for a language (spaCy's), which remembers its last few texts.

    Several filters split the same text into words and sentences; splitting is most of the cost of curation.
    datatrove's plain ``zh`` is a whitespace tokenizer, hence ``cmn_Hani`` (jieba).
    """

    _CODES: ClassVar[dict[str, str]] = {"en": "eng", "zh": "cmn_Hani"}
    _REMEMBERED = 4

    def __init__(self, language: Literal["en", "zh"]):
        super().__init__(language)
        self._split: dict[str, tuple[list[str], list[tuple[int, int]]]] = {}

    def _analysed(self, text: str) -> tuple[list[str], list[tuple[int, int]]]:
        found = self._split.get(text)
        if found is not None:
            return found
        if self.language == "zh":
            import jieba  # type: ignore[import-untyped]

            jieba.setLogLevel(logging.WARNING)
        nlp = load_word_tokenizer(self._CODES[str(self.language)]).tokenizer
        nlp.max_length = max(nlp.max_length, len(text) + 10)
        with nlp.memory_zone():
            document = nlp(text)
            words = [word for token in document if (word := token.text.strip())]
            spans = [(sentence.start_char, sentence.end_char) for sentence in document.sents]
        while len(self._split) >= self._REMEMBERED:
            del self._split[next(iter(self._split))]
        self._split[text] = words, spans
        return words, spans

    def word_tokenize(self, text: str) -> list[str]:
        """The words of ``text``."""
        return self._analysed(text)[0]

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences of ``text``."""
        return [sentence for a, b in self._analysed(text)[1] if (sentence := text[a:b].strip())]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Start and end of every sentence of ``text``."""
        return self._analysed(text)[1]

    def __reduce__(self) -> tuple[type[RememberingTokenizer], tuple[str | None]]:
        return RememberingTokenizer, (self.language,)


class SpaceTokenizer(WordTokenizer):  # type: ignore[misc]
    """Words between spaces, for simplified text."""

    def __init__(self) -> None:
        super().__init__(None)

    def word_tokenize(self, text: str) -> list[str]:
        """The words of ``text``."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """The whole text: simplified text has no sentence marks."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The whole text as one span."""
        return [(0, len(text))]


ENGLISH = RememberingTokenizer("en")
CHINESE = RememberingTokenizer("zh")
SPACES = SpaceTokenizer()


class LocalLanguageModel(FastTextLID):  # type: ignore[misc]
    """fastText language identification with a model file that is already here."""

    def __init__(self, languages: list[str], path: Path):
        super().__init__(languages)
        self._model: Any = None
        self.path = str(path)

    @property
    def model(self) -> Any:
        """The loaded model; loaded once per process."""
        if self._model is None:
            from fasttext.FastText import _FastText  # type: ignore[import-untyped]

            self._model = _FastText(self.path)
        return self._model
