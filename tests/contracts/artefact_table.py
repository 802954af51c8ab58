"""The table "Stages and what they write" of ``docs/contracts.md``, and what files of a run it does not tell of.

In the last column each name between backquotes is an entry: ``<x>`` stands for any one part of a path, ``{a,b}`` for
each of several, a slash at the end for everything below a folder. An entry followed by ``(when …)`` may be missing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_ENTRY = re.compile(r"`([^`]+)`(?P<condition>\s*\(when [^)]+\))?")

_REMARK = re.compile(r"\((?!when )[^)]*\)")


@dataclass(frozen=True)
class Entry:
    """One name of the table. ``optional`` when the table gives a condition for it."""

    name: str
    optional: bool = False

    def alternatives(self) -> list[str]:
        """The names that ``{a,b}`` stands for."""
        parts = [
            part[1:-1].split(",") if part[:1] == "{" else [part]
            for part in re.split(r"(\{[^}]*\})", self.name)
        ]
        return ["".join(choice) for choice in itertools.product(*parts)]


@dataclass(frozen=True)
class Row:
    """One stage: the component that does it, its parents' stages by role, and the entries of what it writes."""

    component: str
    parents: Mapping[str, str]
    writes: tuple[Entry, ...]


def read_table(markdown: str) -> dict[str, Row]:
    """The rows by the stage's name.

    Raises:
        ValueError: there is no such table, or a row of it has other columns.
    """
    lines = iter(markdown.splitlines())
    if not any(re.match(r"\|\s*stage\b.*\|\s*writes\s*\|", line) for line in lines):
        raise ValueError("no table whose first column is the stage and whose last is what it writes")
    next(lines)  # the rule below the head
    rows = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        named = re.match(r"`(\w+)` \(`([\w/.]+)`\)$", cells[0])
        if named is None or len(cells) != 3:
            raise ValueError(f"not a row of three columns that begins with `stage` (`folder/`): {line}")
        told = _REMARK.sub("", cells[2])
        entries = tuple(
            Entry(name, bool(match["condition"]))
            for match in _ENTRY.finditer(told)
            for name in match[1].split()
        )
        rows[named[1]] = Row(named[2], _parents(cells[1]), entries)
    return rows


def _parents(cell: str) -> dict[str, str]:
    """``pretrain, teacher: synthesize`` is the role of that name, and the role ``teacher`` of another."""
    parents = {}
    for text in filter(None, (part.strip() for part in cell.strip("–-").split(","))):
        role, _, stage = text.partition(":")
        parents[role.strip()] = stage.strip() or role.strip()
    return parents


def _matches(name: str, path: str) -> bool:
    pattern = "".join(
        "[^/]+" if part[:1] == "<" else re.escape(part) for part in re.split(r"(<[^>]*>)", name)
    )
    return re.fullmatch(pattern + (".+" if name.endswith("/") else ""), path) is not None


def disagreements(entries: Iterable[Entry], files: Iterable[str]) -> list[str]:
    """Files that no entry tells of, and entries (or alternatives of one) that no file bears out."""
    wanted = [(entry, name) for entry in entries for name in entry.alternatives()]
    paths = sorted(files)
    found = [
        f"{path} is in no entry" for path in paths if not any(_matches(name, path) for _, name in wanted)
    ]
    found += [
        f"{name} is not written"
        for entry, name in wanted
        if not entry.optional and not any(_matches(name, path) for path in paths)
    ]
    return found
