"""The code in a page of the docs: ``python -m tests.docs.blocks PAGE`` runs its Python blocks, in one namespace.

Blocks are found and run by Sybil. The word after the fence says what a block is; what a reader cannot run as it stands
says why: ```` ```python no-run: needs eight GPUs ````.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.parsers.rest.lexers import DirectiveLexer

_INFO = re.compile(r"(?P<language>\S*)[ \t]*(?P<marker>[^\n]*)$\n", re.MULTILINE)
_FENCES = RawFencedCodeBlockLexer(_INFO)
_DIRECTIVES = DirectiveLexer("code-block", r"\S+")
_NO_RUN = re.compile(r"no-run: \S.*")
# What is neither run nor checked: transcripts, excerpts of files, and what other programs read.
SHOWN = {"console", "text", "markdown", "json", "toml", "cpp", "diff", "html"}


def _regions(document: Document) -> Iterable[Region]:
    if document.path.endswith(".md"):
        yield from _FENCES(document)
        return
    for region in _DIRECTIVES(document):
        region.lexemes.update(language=region.lexemes["arguments"], marker="")
        yield region


def _parse(document: Document) -> Iterable[Region]:
    run = PythonEvaluator()
    for region in _regions(document):
        region.parsed = region.lexemes["source"]
        if region.lexemes["language"] == "python" and not region.lexemes["marker"]:
            region.evaluator = run
        yield region


def open_page(path: Path) -> Document:
    """A page with its blocks as examples; those of Python can be evaluated."""
    return Document.parse(str(path), _parse)


def language(block: Example) -> str:
    """The first word after the fence."""
    found: str = block.region.lexemes["language"]
    return found


def is_run(block: Example) -> bool:
    """Whether it is Python without a marker."""
    return block.region.evaluator is not None


def faults(page: Document) -> list[str]:
    """Blocks of no known language, and markers other than ``no-run`` with a reason."""
    found = []
    for block in page:
        marker = block.region.lexemes["marker"]
        if language(block) not in {"python", "sh", *SHOWN}:
            found.append(f"line {block.line}: a block of {language(block)!r}")
        elif marker and not (language(block) in ("python", "sh") and _NO_RUN.fullmatch(marker)):
            found.append(f"line {block.line}: the marker {marker!r}; known is 'no-run: REASON'")
    return found


def main(path: str) -> None:
    """Run the blocks in the working directory."""
    for block in open_page(Path(path)):
        block.evaluate()


if __name__ == "__main__":
    main(sys.argv[1])
