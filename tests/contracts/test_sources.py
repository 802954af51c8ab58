"""What holds of every committed file: no module is too long, nothing names a workplace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .source_tree import PROJECT, committed, expect_nothing, relative

MODULE_LINES = 600
TEST_LINES = 800  # tests read as lists
WORK, ROOT, FARM = "work", "root", "farm"
MACHINE_PATHS = re.compile(rf"(?<![\w.$}}])/(?:{WORK}|{ROOT}|{FARM})/")
REGISTRY_HOSTS = re.compile(
    r"(?:pypi\.org|pythonhosted\.org|registry\.npmjs\.org|registry\.yarnpkg\.com|deb\.debian\.org|"
    r"archive\.ubuntu\.com|security\.debian\.org|download\.pytorch\.org)"
)


def test_no_module_is_too_long() -> None:
    expect_nothing(
        f"{relative(path)}: {lines} lines"
        for path in committed("*.py", "*.cpp", "*.hpp", "*.h")
        if (lines := path.read_text().count("\n"))
        > (TEST_LINES if path.is_relative_to(PROJECT / "tests") else MODULE_LINES)
    )


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = []
    for path in committed():
        data = path.read_bytes()
        if b"\0" in data[:8192] or path == Path(__file__).resolve():
            continue
        text = data.decode("utf-8", errors="replace")
        for pattern in (MACHINE_PATHS, REGISTRY_HOSTS):
            for match in pattern.finditer(text):
                found.append(
                    f"{relative(path)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group(0)}"
                )
    expect_nothing(found)


@pytest.mark.parametrize(
    "line", [f"cd /{WORK}/main", f"'/{ROOT}/x'", f"=/{FARM}/a", "https://pypi.org/simple"]
)
def test_a_machine_or_a_registry_is_seen(line: str) -> None:
    assert MACHINE_PATHS.search(line) or REGISTRY_HOSTS.search(line)


@pytest.mark.parametrize(
    "line", [f"scratch/{WORK}/file", f"the .{WORK}/ folder", f"$HOME/{ROOT}/x", f"a/{FARM}/b"]
)
def test_other_paths_are_not_reported(line: str) -> None:
    assert not MACHINE_PATHS.search(line)
