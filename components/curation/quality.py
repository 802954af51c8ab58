"""Quality scores: a DCLM-style fastText classifier trained here, ``train_classifier(good, bad, …)``.

Good text is what the corpora hold of encyclopedia and manuals; bad text is what the web is full of and curation must
drop: navigation and other boilerplate of the very pages read, word salad, stuck repetition, random characters (DCLM,
arXiv:2406.11794, section 4.4, trains on instruction data against plain web text, which no registry carries). The
classes are easy to tell apart: the score finds junk, it does not grade good prose.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from datatrove.data import Document  # type: ignore[import-untyped]
from datatrove.pipeline.filters.base_filter import BaseFilter  # type: ignore[import-untyped]

from components.artifacts import StageError, write_atomically

_BOILERPLATE = re.compile(
    r"nav|menu|footer|header|sidebar|breadcrumb|related|share|social|copyright|toolbar", re.I
)
_BOILERPLATE_TAGS = ("nav", "footer", "header", "aside", "form", "button")
_LEAST_EXAMPLES = 20
_EXAMPLE_CHARS = 1_500
_M_PERTURB = -6  # malloc.h


def classifier_form(text: str, language: str) -> str:
    """Text as the classifier sees it: one line, lower case, Chinese characters apart."""
    if language == "zh":
        text = re.sub(r"([\u4e00-\u9fff])", r" \1 ", text)
    return " ".join(text.lower().split())


def boilerplate(html: str) -> str:
    """The text of a page's navigation, headers, footers, forms and menus, one element a line."""
    from lxml import etree  # type: ignore[import-untyped]
    from lxml import html as lxml_html

    try:
        root = lxml_html.fromstring(html.encode("utf-8", errors="replace"))
    except (etree.ParserError, ValueError):
        return ""
    lines: list[str] = []
    for element in root.iter():
        if not isinstance(element.tag, str):
            continue
        names = f"{element.get('class', '')} {element.get('id', '')} {element.get('role', '')}"
        if element.tag in _BOILERPLATE_TAGS or _BOILERPLATE.search(names):
            line = " ".join(" ".join(element.itertext()).split())
            if len(line) >= 20 and line not in lines:
                lines.append(line[:_EXAMPLE_CHARS])
        if len(lines) >= 20:
            break
    return "\n".join(lines)


def corrupted(texts: Sequence[str], language: str, rng: random.Random) -> list[str]:
    """Bad examples made from good ones: shuffled words, a phrase repeated, characters scrambled, lists of words."""
    made: list[str] = []
    for text in texts:
        words = list(text) if language == "zh" else text.split()
        if len(words) < 8:
            continue
        words = words[:250]
        kind = rng.randrange(4)
        glue = "" if language == "zh" else " "
        if kind == 0:
            rng.shuffle(words)
            made.append(glue.join(words))
        elif kind == 1:
            start = rng.randrange(len(words) - 4)
            made.append(glue.join(words[start : start + rng.randint(2, 4)] * 30))
        elif kind == 2:
            characters = list(text[:600])
            rng.shuffle(characters)
            made.append("".join(characters))
        else:
            made.append(" | ".join(rng.choices(words, k=60)))
    return made


def train_classifier(
    good: Iterable[str], bad: Iterable[str], language: str, path: Path, seed: int
) -> dict[str, float]:
    """Train a fastText classifier and write it to ``path``.

    Returns:
        Examples of each class and accuracy on a held-out tenth.

    Raises:
        StageError: too few examples of a class.
    """
    from fasttext.FastText import train_supervised  # type: ignore[import-untyped]

    rng = random.Random(f"{seed} {language}")
    rows = [("hq", text) for text in good] + [("lq", text) for text in bad]
    rows = [(label, classifier_form(text, language)[:_EXAMPLE_CHARS]) for label, text in rows if text.strip()]
    counts = {label: sum(row[0] == label for row in rows) for label in ("hq", "lq")}
    if min(counts.values()) < _LEAST_EXAMPLES:
        raise StageError(
            f"the {language} quality classifier has {counts['hq']} good and {counts['lq']} bad examples and needs "
            f"{_LEAST_EXAMPLES} of each; add sources to curate.sources or set curate.quality_threshold to 0"
        )
    rng.shuffle(rows)
    held = max(1, len(rows) // 10)
    text_path = path.with_suffix(".txt")
    lines = [f"__label__{label} {text}\n" for label, text in rows]
    write_atomically(text_path, "".join(lines[held:]).encode())
    model = train_reliably(
        train_supervised, text_path, lr=0.2, epoch=12, dim=24, wordNgrams=2, bucket=200_000, minCount=2
    )
    right = sum(_best(model, text) == label for label, text in rows[:held])
    temporary = path.with_suffix(".tmp")
    model.save_model(str(temporary))
    least_bytes = 4 * (model.get_input_matrix().size + model.get_output_matrix().size)
    if temporary.stat().st_size < least_bytes:  # fastText does not notice a full disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    temporary.replace(path)
    return {"good": counts["hq"], "bad": counts["lq"], "accuracy": right / held}


def train_reliably(train_supervised: Any, path: Path, **options: Any) -> Any:
    """Train fastText, the same bytes for the same text on every glibc: one thread, and memory that starts as zeros.

    With one thread fastText fills only the first tenth of its input matrix (``DenseMatrix::uniform``, 0.9.3) and leaves
    the rest as the allocator gave it, which ends in NaN now and then. ``M_PERTURB`` makes glibc's
    malloc fill every block with the complement of the given byte. With more threads training races.
    """
    try:
        fill = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return train_supervised(input=str(path), thread=1, verbose=0, **options)
    fill(_M_PERTURB, 0xFF)
    try:
        return train_supervised(input=str(path), thread=1, verbose=0, **options)
    finally:
        fill(_M_PERTURB, 0)


def _best(model: Any, text: str) -> str:
    ((_, label),) = model.f.predict(text + "\n", 1, 0.0, "strict")
    return str(label).removeprefix("__label__")


class QualityFilter(BaseFilter):  # type: ignore[misc]
    """Writes ``metadata.quality`` in [0, 1] and drops documents below a threshold."""

    name = "Quality score"

    def __init__(self, model: Path | None, kind: Literal["en", "zh", "code", "none"], threshold: float):
        super().__init__()
        self.path = None if model is None else str(model)
        self.kind = kind
        self.threshold = threshold
        self._model: Any = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep ``doc``, with the reason when not."""
        score = self.score(doc.text)
        doc.metadata["quality"] = round(score, 4)
        return True if score >= self.threshold else (False, f"quality_below_{self.threshold:g}")

    def score(self, text: str) -> float:
        """Quality of ``text`` in [0, 1]."""
        if self.kind == "none":
            return 1.0
        if self.kind == "code":
            return code_score(text)
        if self._model is None:
            from fasttext.FastText import _FastText

            self._model = _FastText(self.path)
        pairs = self._model.f.predict(classifier_form(text, self.kind) + "\n", 2, 0.0, "strict")
        return min(1.0, max(0.0, next((float(p) for p, label in pairs if label == "__label__hq"), 0.0)))


def code_score(text: str) -> float:
    """How readable source text looks: comments or prose present, short lines, few digits, little repetition."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return 0.0
    explained = min(1.0, sum(map(_is_explanation, lines)) / len(lines) / 0.05)
    short = sum(len(line) <= 100 for line in lines) / len(lines)
    digits = 1.0 - min(1.0, sum(map(str.isdigit, text)) / len(text) / 0.2)
    distinct = len(set(lines)) / len(lines)
    return (explained + short + digits + distinct) / 4


def _is_explanation(line: str) -> bool:
    return line.startswith(("#", "//", "/*", "*", '"""', "'''")) or line.endswith((".", ":"))
