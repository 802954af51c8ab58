"""The engine's C++ sources: folders by what they hold, whose ``#include`` arrows point one way.

``model/`` reads files, ``kernels/`` compute, ``experts/`` fetch and keep experts, ``forward/`` runs the model with all
three; bindings, tests and tools stand on top and are included by nothing.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

import pytest

from .graph import cycles, merged
from .source_tree import committed, expect_nothing, relative

SOURCES = "runtime_cpu/csrc"
FOLDERS = {"model", "kernels", "experts", "forward", "tests", "tools", "bindings"}
NOT_BELOW: dict[str, set[str]] = {
    "kernels": {"forward", "experts"},
    "model": {"forward", "experts"},
    "experts": {"forward"},
}
ON_TOP = {"bindings", "tests", "tools"}
# A comment, or a literal that may hold what looks like one.
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|(\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*')", re.DOTALL)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*([\"<])([^\">\n]+)[\">]", re.MULTILINE)


def without_comments(text: str) -> str:
    """The same lines with nothing in place of comments."""
    return _COMMENT.sub(lambda match: match.group(1) or "\n" * match.group(0).count("\n"), text)


def included(path: str, text: str, files: Mapping[str, str]) -> list[tuple[int, str, str]]:
    """Line, file and spelling of every include that is ours; a quoted one that is nowhere has an empty file."""
    code, found = without_comments(text), []
    for match in _INCLUDE.finditer(code):
        quote, name = match.groups()
        line = code.count("\n", 0, match.start()) + 1
        bases = [posixpath.dirname(path), SOURCES] if quote == '"' else [SOURCES]
        candidates = (posixpath.normpath(f"{base}/{name}") for base in bases)
        target = next((each for each in candidates if each in files), "")
        if target or quote == '"':
            found.append((line, target, name))
    return found


def arrows(files: Mapping[str, str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for path, text in files.items():
        found[path] = {}
        for line, target, _ in included(path, text, files):
            if target:
                found[path].setdefault(target, line)
    return found


def folder(path: str) -> str:
    """The room of a file: its folder; ``bindings.cpp`` is one of its own, any other file in no folder is in none."""
    name = path.removeprefix(f"{SOURCES}/")
    return name.split("/")[0] if "/" in name else "bindings" if name.startswith("bindings.") else ""


def include_cycles(files: Mapping[str, str]) -> list[str]:
    """Cycles between files, then those between folders that none of them explains."""
    lines = arrows(files)
    return cycles(lines) + cycles(merged(lines, {path: folder(path) for path in files if folder(path)}))


def layer_violations(files: Mapping[str, str]) -> list[str]:
    found = []
    for path, text in files.items():
        for line, target, name in included(path, text, files):
            here, there = folder(path), folder(target)
            if not target:
                found.append(f"{path}:{line}: no file {name} beside it or in {SOURCES}")
            elif there in NOT_BELOW.get(here, set()) or (there in ON_TOP and here not in ON_TOP):
                found.append(f"{path}:{line}: {here}/ may not include {name}")
    return found


def without_a_folder(files: Mapping[str, str]) -> list[str]:
    return sorted(path for path in files if folder(path) not in FOLDERS)


def sources() -> dict[str, str]:
    patterns = [f"{SOURCES}/*.{ending}" for ending in ("cpp", "hpp", "h", "inl")]
    return {relative(path): path.read_text() for path in committed(*patterns)}


def test_no_include_leads_back() -> None:
    expect_nothing(include_cycles(sources()))


def test_includes_point_one_way() -> None:
    expect_nothing(layer_violations(sources()))


def test_every_source_lies_in_a_folder_of_its_kind() -> None:
    found = sources()
    expect_nothing(without_a_folder(found))
    assert {folder(path) for path in found} >= {*NOT_BELOW, "forward"}


def made(**texts: str) -> dict[str, str]:
    """``model__a_hpp="..."`` is ``runtime_cpu/csrc/model/a.hpp``."""
    return {
        f"{SOURCES}/{name.replace('__', '/').replace('_hpp', '.hpp').replace('_cpp', '.cpp')}": text
        for name, text in texts.items()
    }


@pytest.mark.parametrize(
    "files",
    [
        made(model__a_hpp='#include "model/b.hpp"', model__b_hpp='#include "a.hpp"'),
        made(model__a_hpp='#include "b.hpp"', model__b_hpp='#include "../model/a.hpp"'),
        made(model__a_hpp="#include <model/b.hpp>", model__b_hpp='  #  include "a.hpp"  // why'),
        made(model__a_hpp='#include "model/a.hpp"'),
        made(a_hpp='#include "b.hpp"', b_hpp='#include "c.hpp"', c_hpp='\n#include "a.hpp"'),
        # No two files include each other, and yet the folders do.
        made(
            model__a_hpp='#include "kernels/c.hpp"', kernels__c_hpp="",
            kernels__b_cpp='#include "../model/d.hpp"', model__d_hpp="",
        ),
    ],
)  # fmt: skip
def test_an_include_cycle_is_seen(files: Mapping[str, str]) -> None:
    assert len(include_cycles(files)) == 1


@pytest.mark.parametrize(
    "files",
    [
        made(model__a_hpp='#include "model/b.hpp"', model__b_hpp='// #include "a.hpp"\n/*\n#include "a.hpp"\n*/'),
        made(model__a_hpp='#include "b.hpp"', model__b_hpp='auto t = "#include \\"a.hpp\\"";\n#include <a.hpp>'),
        made(model__a_cpp='#include "a.hpp"', model__a_hpp='#include "b.hpp"', model__b_hpp="#include <vector>"),
        # The same file name in two folders.
        made(model__table_hpp='#include "kernels/table.hpp"', kernels__table_hpp="#pragma once"),
        made(
            kernels__avx2__a_cpp='#include "../table.hpp"\n#include "kernels/rows.hpp"',
            kernels__table_hpp="", kernels__rows_hpp="",
        ),
    ],
)  # fmt: skip
def test_includes_in_one_direction_are_not_reported(files: Mapping[str, str]) -> None:
    assert include_cycles(files) == []


@pytest.mark.parametrize(
    "files",
    [
        made(kernels__avx2__a_cpp='#include "forward/b.hpp"', forward__b_hpp=""),
        made(kernels__a_cpp='#include "../experts/b.hpp"', experts__b_hpp=""),
        made(model__a_cpp='#include "experts/b.hpp"', experts__b_hpp=""),
        made(experts__a_cpp="#include <forward/b.hpp>", forward__b_hpp=""),
        made(forward__a_cpp='#include "tests/b.hpp"', tests__b_hpp=""),
        made(forward__a_cpp='#include "bindings.hpp"', bindings_hpp=""),
        made(forward__a_cpp='#include "gone.hpp"'),
    ],
)
def test_a_wrong_include_is_seen(files: Mapping[str, str]) -> None:
    assert len(layer_violations(files)) == 1


def test_right_includes_are_not_reported() -> None:
    files = made(
        forward__a_cpp='#include "experts/b.hpp"\n#include "a.hpp"\n#include <vector>\n// #include "gone.hpp"',
        forward__a_hpp='#include "kernels/c.hpp"\n#include "model/d.hpp"',
        experts__b_hpp='#include "kernels/c.hpp"\n#include "model/d.hpp"',
        kernels__c_hpp="",
        model__d_hpp="",
        tests__check_hpp="",
        tests__coverage__a_cpp='#include "../check.hpp"\n#include "forward/a.hpp"',
        bindings_cpp='#include "forward/a.hpp"',
    )
    assert layer_violations(files) == [] and without_a_folder(files) == []
    assert without_a_folder(made(runtime_cpp="", helpers__a_hpp="")) == sorted(
        made(runtime_cpp="", helpers__a_hpp="")
    )
