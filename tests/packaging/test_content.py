"""What a wheel holds and what it leaves behind, and what the editable install has more. Nothing is compiled."""

from __future__ import annotations

import email
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import runtime_cpu

PROJECT = Path(__file__).resolve().parents[2]
HOOK = """
import sys
from scikit_build_core import build
getattr(build, sys.argv[1])(sys.argv[2], {"wheel.cmake": "false"})
"""


def build(hook: str, out: Path) -> None:
    """Call a hook of the build backend for the project, as pip does, without the compiled module."""
    done = subprocess.run(
        [sys.executable, "-c", HOOK, hook, str(out)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build("build_wheel", folder)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def facts(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_string(metadata(wheel, "METADATA"))


def test_a_wheel_holds_the_engine_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    installed = {path for path in wheel.namelist() if ".dist-info/" not in path}
    folder = PROJECT / "runtime_cpu"
    wanted = {
        path.relative_to(PROJECT).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        and not path.is_relative_to(folder / "csrc")
        and path.suffix not in (".so", ".pyc")
        and "__pycache__" not in path.parts
    }
    assert {"runtime_cpu/serve/page.html", "runtime_cpu/py.typed", "runtime_cpu/__main__.py"} <= wanted
    assert installed == wanted


def test_a_wheel_brings_one_command_and_no_entry_point_into_what_it_lacks(wheel: zipfile.ZipFile) -> None:
    lines = metadata(wheel, "entry_points.txt").split("\n")
    assert [line for line in lines if line] == [
        "[console_scripts]",
        "smallthinker = runtime_cpu.__main__:main",
    ]


def test_a_wheel_asks_for_nothing_of_the_pipeline(wheel: zipfile.ZipFile) -> None:
    always = [text for text in facts(wheel).get_all("Requires-Dist", []) if "extra ==" not in text]
    names = sorted(text.split("<")[0].split(">")[0].split("=")[0].strip() for text in always)
    assert names == ["jinja2", "numpy", "starlette", "tokenizers", "uvicorn"]


def test_the_version_is_that_of_the_package(wheel: zipfile.ZipFile) -> None:
    assert facts(wheel)["Version"] == runtime_cpu.__version__
    assert importlib.metadata.version("smallthinker") == runtime_cpu.__version__


def test_the_changelog_begins_with_this_version() -> None:
    headings = [
        line for line in (PROJECT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert re.fullmatch(
        rf"## \[{re.escape(runtime_cpu.__version__)}\] - (unreleased|\d{{4}}-\d\d-\d\d)", headings[0]
    )


def test_an_editable_install_registers_the_plugin_too(tmp_path: Path) -> None:
    build("prepare_metadata_for_build_editable", tmp_path)
    (entry_points,) = tmp_path.glob("*.dist-info/entry_points.txt")
    text = entry_points.read_text()
    assert "[prefect.plugins]\nsmallthinker-short-names = flows.prefect_short_names" in text
    assert "smallthinker = runtime_cpu.__main__:main" in text


def test_all_packages_are_found_from_any_folder(tmp_path: Path) -> None:
    program = (
        "import importlib.metadata, importlib.util as util;"
        "print(*(util.find_spec(name).origin for name in ('flows', 'components', 'model', 'runtime_cpu')), sep='\\n');"
        "(plugin,) = importlib.metadata.entry_points(group='prefect.plugins', name='smallthinker-short-names');"
        "print(util.find_spec(plugin.module).origin)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *(str(PROJECT / name / "__init__.py") for name in ("flows", "components", "model", "runtime_cpu")),
        str(PROJECT / "flows/prefect_short_names.py"),
    ]
