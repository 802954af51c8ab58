"""The house's rules that a machine can check: arrows between rooms, sizes of modules, nothing of a workplace."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
ROOMS = ("flows", "components", "model", "runtime_cpu", "infra", "tests")
# docs/contracts.md: flows -> components -> model; runtime_cpu stands alone; infra holds no code of ours to import.
MAY_IMPORT: dict[str, set[str]] = {
    "flows": {"flows", "components", "model"},
    "components": {"components", "model"},
    "model": {"model"},
    "runtime_cpu": {"runtime_cpu"},
    "infra": {"infra"},
}
# Whoever verifies or measures the engine runs it, as a peer like onnxruntime and not as a foundation.
MEASURES_THE_ENGINE = ("components/export/", "components/devices/")
# An edge box has none of these.
NOT_ON_AN_EDGE_BOX = {
    "torch", "transformers", "deepspeed", "prefect", "mlflow", "datatrove", "lm_eval", "accelerate", "datasets",
}  # fmt: skip
# Imported when a command's option asks for it, with a sentence of its own where it is missing.
ON_REQUEST = {("runtime_cpu/bench/report.py", "mlflow")}
MODULE_LINES = 600
TEST_LINES = 800  # tests read as lists
WORK, ROOT, FARM = "work", "root", "farm"
MACHINE_PATHS = re.compile(rf"(?<![\w.$}}])/(?:{WORK}|{ROOT}|{FARM})/")
REGISTRY_HOSTS = re.compile(
    r"(?:pypi\.org|pythonhosted\.org|registry\.npmjs\.org|registry\.yarnpkg\.com|deb\.debian\.org|"
    r"archive\.ubuntu\.com|security\.debian\.org|download\.pytorch\.org)"
)


def committed(*patterns: str) -> list[Path]:
    """Files that git tracks, and that exist in the checkout."""
    done = subprocess.run(
        ["git", "-C", str(PROJECT), "ls-files", "-z", "--", *patterns], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in done.stdout.decode().split("\0") if name]
    return [path for name in names if (path := PROJECT / name).is_file()]


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Every imported module's full name and its line, imports within functions and relative ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])
            elif node.module:
                yield node.lineno, node.module
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.lineno, node.args[0].value


def violations(room: str, name: str, source: str) -> list[str]:
    """Imports of one module that its room does not allow."""
    package = ".".join(Path(name).with_suffix("").parts[:-1])
    found = []
    for line, module in imported(ast.parse(source), package):
        top = module.split(".")[0]
        if top == "runtime_cpu" and name.startswith(MEASURES_THE_ENGINE):
            continue
        if top in ROOMS and top not in MAY_IMPORT[room]:
            found.append(f"{name}:{line}: {room} may not import {module}")
        elif room == "runtime_cpu" and top in NOT_ON_AN_EDGE_BOX and (name, top) not in ON_REQUEST:
            found.append(f"{name}:{line}: the engine runs without {top}")
    return found


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows_point_one_way(room: str) -> None:
    found = []
    for path in committed(f"{room}/*.py"):
        found += violations(room, path.relative_to(PROJECT).as_posix(), path.read_text())
    assert found == []


@pytest.mark.parametrize(
    ("room", "name", "source"),
    [
        ("model", "model/a.py", "import components.artifacts"),
        ("model", "model/a.py", "def f():\n    from flows import runner"),
        ("components", "components/x/a.py", "from flows.recipes import nano"),
        ("components", "components/x/a.py", "import runtime_cpu"),
        ("components", "components/x/a.py", "import importlib\nimportlib.import_module('flows.runner')"),
        ("runtime_cpu", "runtime_cpu/a.py", "import torch.nn as nn"),
        ("runtime_cpu", "runtime_cpu/a.py", "from model import preset"),
        ("runtime_cpu", "runtime_cpu/a.py", "from tests import x"),
        ("infra", "infra/a.py", "from components import artifacts"),
    ],
)
def test_a_wrong_arrow_is_seen(room: str, name: str, source: str) -> None:
    assert len(violations(room, name, source)) == 1


def test_right_arrows_are_not_reported() -> None:
    assert (
        violations(
            "components", "components/x/a.py", "import torch\nfrom model import preset\nfrom . import b"
        )
        == []
    )
    assert (
        violations(
            "runtime_cpu", "runtime_cpu/a.py", "import numpy\nfrom .b import c\nfrom runtime_cpu import d"
        )
        == []
    )


def test_no_module_is_too_long() -> None:
    long = {
        path.relative_to(PROJECT).as_posix(): lines
        for path in committed("*.py", "*.cpp", "*.hpp", "*.h")
        if (lines := path.read_text().count("\n"))
        > (TEST_LINES if path.is_relative_to(PROJECT / "tests") else MODULE_LINES)
    }
    assert long == {}


def texts() -> Iterator[tuple[str, int, str]]:
    for path in committed():
        data = path.read_bytes()
        if b"\0" in data[:8192] or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
            yield path.relative_to(PROJECT).as_posix(), number, line


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = [
        f"{name}:{number}: {match.group(0)}"
        for name, number, line in texts()
        for pattern in (MACHINE_PATHS, REGISTRY_HOSTS)
        for match in pattern.finditer(line)
    ]
    assert found == []


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
