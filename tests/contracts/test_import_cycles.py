"""No import cycle, neither between modules nor between the rooms of a package: also those that only run lazily.

A cycle that hides in a function or under ``TYPE_CHECKING`` still means that neither file can be read first.
"""

# ruff: noqa: E501 - a made-up file takes one line

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest

from .graph import cycles, merged
from .source_tree import PRODUCT, SourceTree, expect_nothing


def module_cycles(tree: SourceTree) -> list[str]:
    return cycles(tree.arrows)


def room_cycles(tree: SourceTree) -> list[str]:
    """Cycles between the direct children of each package, a sub-package being one room."""
    found = []
    packages = {
        ".".join(parts[:n])
        for name in tree.modules
        for parts in [name.split(".")]
        for n in range(1, len(parts))
    }
    for package in sorted(packages):
        depth = package.count(".") + 1
        room_of = {
            name: ".".join(name.split(".")[: depth + 1])
            for name in tree.modules
            if name == package or name.startswith(f"{package}.")
        }
        found += cycles(merged(tree.arrows, room_of))
    return list(dict.fromkeys(found))


def named_like_the_standard_library(tree: SourceTree) -> list[str]:
    """Run as a script, such a module hides the standard one from everything that its process imports."""
    return [
        module.path
        for name, module in tree.modules.items()
        if (stem := name.rpartition(".")[2]) in sys.stdlib_module_names and not stem.startswith("__")
    ]


@pytest.mark.parametrize("room", [*PRODUCT, "tests"])
def test_no_module_imports_itself_by_a_detour(room: str) -> None:
    expect_nothing(module_cycles(SourceTree.committed(room)))


@pytest.mark.parametrize("room", [*PRODUCT, "tests"])
def test_no_two_rooms_import_each_other(room: str) -> None:
    expect_nothing(room_cycles(SourceTree.committed(room)))


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    expect_nothing(named_like_the_standard_library(SourceTree.committed(*PRODUCT)))


EMPTY = {"flows/__init__.py": "", "flows/sub/__init__.py": ""}


@pytest.mark.parametrize(
    "files",
    [
        {"flows/a.py": "from flows.b import x", "flows/b.py": "from flows.a import y"},
        {"flows/a.py": "import flows.b as b", "flows/b.py": "import flows.a"},
        {"flows/a.py": "from . import b", "flows/b.py": "from .a import y"},
        {"flows/a.py": "from flows import b as c", "flows/b.py": "from . import a as d"},
        {"flows/a.py": "from flows.b import x", "flows/b.py": "def f():\n    from flows import a\n    return a"},
        {
            "flows/a.py": "from flows.b import x",
            "flows/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flows.a import Y",
        },
        {"flows/a.py": "from flows.b import x", "flows/b.py": "import importlib\nimportlib.import_module('flows.a')"},
        {"flows/a.py": "from .b import x", "flows/b.py": "import importlib as il\nil.import_module(name='flows.a')"},
        {
            "flows/a.py": "from .b import x",
            "flows/b.py": "from importlib import import_module as load\nload('.a', package='flows')",
        },
        {"flows/a.py": "from .b import x", "flows/b.py": "from importlib import *\nimport_module('.a', __package__)"},
        {"flows/a.py": "from .b import x", "flows/b.py": "NAME = 'flows.a'\n__import__(NAME)"},
        {"flows/a.py": "from .b import x", "flows/b.py": "import importlib\nimportlib.import_module('flows' + '.a')"},
        {"flows/a.py": "from .b import x", "flows/b.py": "import runpy\nrunpy.run_module('flows.a')"},
        {"flows/a.py": "import flows.sub.c", "flows/sub/c.py": "from ..a import y"},
        {"flows/a.py": "import flows.sub.c", "flows/sub/c.py": "from .. import a"},
        {"flows/a.py": "from flows.sub import c", "flows/sub/c.py": "from flows import a"},
        # A submodule that imports names out of its own package, which gets them from the submodule.
        {"flows/__init__.py": "from flows.a import x\nX = 1", "flows/a.py": "from flows import X"},
        {"flows/__init__.py": "from .a import x\nX = 1", "flows/a.py": "from . import X"},
        {"flows/__init__.py": "from .a import x", "flows/a.py": "import flows"},
        {"flows/__init__.py": "from .a import *", "flows/a.py": "from flows import *"},
        {"flows/sub/__init__.py": "from .c import x\nX = 1", "flows/sub/c.py": "from . import X"},
        # The package gives the submodule's name to the function in it.
        {"flows/__init__.py": "from .a import x\nfrom .b import b", "flows/a.py": "from . import b", "flows/b.py": ""},
        # A folder needs no __init__.
        {"flows/a.py": "from flows.bare import c", "flows/bare/c.py": "from flows import a"},
        {"flows/a.py": "import flows.bare.c", "flows/bare/c.py": "from .. import a"},
        # Lazy names of a package.
        {
            "flows/__init__.py": "def __getattr__(name):\n    return importlib.import_module(f'{__name__}.a')\nimport importlib",
            "flows/a.py": "from flows import X",
        },
        {"flows/a.py": "from .b import x", "flows/b.py": "from .c import x", "flows/c.py": "from .a import x"},
    ],
)  # fmt: skip
def test_a_cycle_is_seen(files: Mapping[str, str]) -> None:
    assert len(module_cycles(SourceTree({**EMPTY, **files}))) == 1


@pytest.mark.parametrize(
    "files",
    [
        {"flows/a.py": "from flows.b import x", "flows/b.py": "import json"},
        # A package may import its submodules, and those each other by way of the package's name.
        {"flows/__init__.py": "from .a import x", "flows/a.py": "from flows import b", "flows/b.py": ""},
        {"flows/__init__.py": "from . import a, b", "flows/a.py": "from . import b", "flows/b.py": ""},
        {"flows/__init__.py": "from .a import x", "flows/a.py": "import flows.b", "flows/b.py": ""},
        # Texts and names of other packages.
        {"flows/a.py": "from flows.b import x", "flows/b.py": "'''from flows.a import y'''"},
        {"flows/a.py": "from flows.b import x", "flows/b.py": "import a\nfrom other.flows import a"},
        {"flows/a.py": "from flows.b import x", "flows/b.py": "load('flows.a')\nimport_module('flows.a')"},
        {"flows/a.py": "from flows.b import x", "flows/b.py": "from flows._core import y"},
    ],
)
def test_what_is_no_cycle_is_not_reported(files: Mapping[str, str]) -> None:
    assert module_cycles(SourceTree({**EMPTY, **files})) == []


def test_a_cycle_is_shown_as_a_chain_with_lines() -> None:
    files = {"flows/a.py": "\nfrom flows.b import x", "flows/b.py": "import json, flows.a"}
    assert module_cycles(SourceTree(files)) == ["flows.a:2 -> flows.b:1 -> flows.a"]


def test_every_cycle_of_a_knot_is_shown_once() -> None:
    knot = {"a": {"b": 1, "c": 2}, "b": {"a": 3}, "c": {"a": 4}, "d": {"a": 5}}
    assert cycles(knot) == ["a:1 -> b:3 -> a", "a:2 -> c:4 -> a"]


@pytest.mark.parametrize(
    "files",
    [
        # No two modules import each other, and yet neither folder can be read first.
        {"flows/sub/c.py": "from flows.a import x", "flows/a.py": "from flows.sub.d import y", "flows/sub/d.py": ""},
        {
            "flows/p/__init__.py": "", "flows/p/a.py": "from flows.q import b", "flows/p/c.py": "",
            "flows/q/__init__.py": "", "flows/q/b.py": "import flows.p.c",
        },
        {
            "flows/sub/p/__init__.py": "", "flows/sub/p/a.py": "from ..q.b import x", "flows/sub/p/c.py": "",
            "flows/sub/q/__init__.py": "", "flows/sub/q/b.py": "from ..p import c",
        },
    ],
)  # fmt: skip
def test_rooms_that_import_each_other_are_seen(files: Mapping[str, str]) -> None:
    tree = SourceTree({**EMPTY, **files})
    assert module_cycles(tree) == [] and len(room_cycles(tree)) == 1


def test_rooms_in_one_direction_are_not_reported() -> None:
    files = {
        "flows/sub/__init__.py": "from .d import y", "flows/sub/c.py": "from .d import y", "flows/sub/d.py": "",
        "flows/a.py": "from flows.sub import y\nfrom flows.sub.c import z", "flows/__init__.py": "from .a import x",
    }  # fmt: skip
    assert room_cycles(SourceTree(files)) == []


def test_a_name_of_the_standard_library_is_seen() -> None:
    files = {
        "flows/inspect.py": "",
        "flows/sub/queue.py": "",
        "flows/__main__.py": "",
        "flows/__init__.py": "",
    }
    tree = SourceTree({**files, "flows/json/__init__.py": "", "flows/inspect_model.py": ""})
    assert named_like_the_standard_library(tree) == [
        "flows/inspect.py",
        "flows/json/__init__.py",
        "flows/sub/queue.py",
    ]
