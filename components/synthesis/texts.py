"""Texts as the teacher's filters see them: ``clean(answer)``, ``excerpt(text, 700)``, ``content_words(text)``."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

_PREAMBLE: Final = re.compile(
    r"^(?:(?:sure|certainly|of course|absolutely|okay|ok)\b[^\n]{0,120}?[:!.]\s+)?"
    r"(?:here(?:'s| is| are)\b[^\n:]{0,120}:\s+)?"
    r"(?:\**(?:rewritten text|new text|rewrite|text|answer|question|problem|persona|title)\**:\**\s+)?",
    re.IGNORECASE,
)
_SENTENCE_END: Final = re.compile(r"[.!?。！？…][\"'”’)\]]*(?=\s|$|(?<=[。！？]))")
_WORD: Final = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_CJK: Final = re.compile(r"[\u4e00-\u9fff]+")
_NUMBER: Final = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_STEM_CHARS: Final = 6
_SHORTEST_CONTENT_WORD: Final = 4
_FUNCTION_WORDS: Final = frozenset(
    """
    about above after again against also although always among another anything because been before being
    below between both cannot could does doing done down during each either else even ever every everything
    from further have having here hers herself himself however into itself just like made make many might
    more most much must myself neither never nothing often once only other others ours over perhaps quite
    rather really same shall should since some something such than that their theirs them themselves then
    there therefore these they thing things this those though through thus toward under until upon used
    using very want well were what whatever when where whether which while whom whose will with within
    without would your yours yourself
    """.split()  # noqa: SIM905
)


def clean(answer: str) -> str:
    """An answer without the teacher's announcement of it, surrounding quotes or code fences."""
    text = answer.strip()
    if text.startswith("```") and text.endswith("```") and len(text) > 6:
        text = text[3:-3].split("\n", 1)[-1].strip()
    text = _PREAMBLE.sub("", text, count=1).strip()
    for opening, closing in (('"', '"'), ("“", "”"), ("**", "**")):
        inner = text[len(opening) : -len(closing)]
        if len(text) > 4 and text.startswith(opening) and text.endswith(closing) and opening not in inner:
            text = inner.strip()
    return text


def whole_sentences(text: str) -> str:
    """``text`` up to the end of its last whole sentence; empty when it has none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""


def first_sentence(text: str) -> str:
    """The first sentence of the first line that says anything; the whole line when no sentence ends in it."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    end = _SENTENCE_END.search(line)
    return line[: end.end()].rstrip() if end else line


def excerpt(text: str, limit: int) -> str:
    """The beginning of ``text``, at most ``limit`` characters, whole sentences where it has them."""
    text = text.strip()
    if len(text) <= limit:
        return text
    head = text[:limit]
    # A sentence may end exactly at the limit only if the text goes on with a space.
    sentences = whole_sentences(head if text[limit].isspace() else head[:-1])
    if len(sentences) >= limit // 3:
        return sentences
    return head.rsplit(None, 1)[0] if any(c.isspace() for c in head) else head


def words(text: str) -> list[str]:
    """Lower-case words; a Chinese character counts as one."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if _CJK.search(word):
            found.extend(word)
        else:
            found.append(word)
    return found


def content_words(text: str) -> set[str]:
    """What a text is about: stems (six letters) of its longer words without function words, and Chinese bigrams."""
    stems = {
        word[:_STEM_CHARS]
        for word in _WORD.findall(text.lower())
        if len(word) >= _SHORTEST_CONTENT_WORD and word not in _FUNCTION_WORDS and not _CJK.search(word)
    }
    for run in _CJK.findall(text):
        stems.update(run[i : i + 2] for i in range(len(run) - 1))
    return stems


def numbers(text: str) -> Counter[str]:
    """Every number written in digits, with its count; thousands separators and trailing zeros do not matter."""
    found: Counter[str] = Counter()
    for match in _NUMBER.findall(text):
        number = match.replace(",", "")
        if "." in number:
            number = number.rstrip("0").rstrip(".")
        found[number.lstrip("0") or "0"] += 1
    return found


def ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    """Distinct word n-grams; a shorter text is one n-gram."""
    found = words(text)
    if len(found) <= size:
        return {tuple(found)} if found else set()
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}
