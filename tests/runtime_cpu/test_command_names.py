"""How the engine's commands are called: by one name with a list, and each as a module of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import runtime_cpu
from runtime_cpu import _core
from runtime_cpu.__main__ import main
from runtime_cpu.commands.table import COMMANDS, PACKAGE

FOLDER = Path(runtime_cpu.__file__).parent
# As they were called before the modules had folders: what scripts and services hold.
NAMES = ("bench", "chat", "head", "inspect", "logits", "pack", "perplexity", "reads", "serve", "synth")


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_a_module_and_a_word(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = python("-m", f"runtime_cpu.{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m runtime_cpu.{name} [-h]")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.split() == done.stdout.split()


def test_the_list_has_a_line_for_every_command() -> None:
    done = python("-m", "runtime_cpu")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m runtime_cpu COMMAND")
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(NAMES) == sorted(COMMANDS)
    for command in COMMANDS.values():
        assert command.line in done.stdout
    assert python("-m", "runtime_cpu", "--help").stdout == done.stdout


def test_a_wrong_command_is_told_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chant", "model.gguf"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'chant'" in said and all(name in said for name in NAMES)
    assert main(["pack", "no such source", "out.gguf"]) == 2  # the command's own code comes through
    assert "no such source" in capsys.readouterr().err


def test_the_processes_of_the_benchmark_keep_their_names() -> None:
    done = python("-m", f"{PACKAGE}.bench_worker", "versions")
    assert done.returncode == 0 and "numpy" in done.stdout
    assert find_spec("runtime_cpu.bench_machine") is not None


def test_nothing_else_is_found() -> None:
    assert find_spec("runtime_cpu.engine_of_old") is None
    done = python("-m", f"{PACKAGE}.generation")
    assert done.returncode == 1 and "No module named runtime_cpu.generation" in done.stderr


def test_no_module_is_called_as_one_of_the_standard_library() -> None:
    """A script in its folder would import it in place of the standard library's, and so would the peer's Python."""
    names = [path.stem for path in FOLDER.rglob("*.py")]
    assert names and not set(names) & sys.stdlib_module_names


def test_a_plain_copy_of_the_package_has_its_commands(tmp_path: Path) -> None:
    """As a wheel lays it out: no editable install, whose own finder comes before all others, has a part in it."""
    copy = tmp_path / "site" / "runtime_cpu"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("csrc", "__pycache__"))
    core = Path(_core.__file__)
    shutil.copy(core, copy / core.name)
    program = (
        "import runpy, sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'ScikitBuild' not in type(finder).__name__]\n"
        f"sys.path.insert(0, {str(copy.parent)!r})\n"
        "sys.argv = ['inspect', '--help']\n"
        "import runtime_cpu\n"
        f"assert runtime_cpu.__file__.startswith({str(copy)!r})\n"
        "runpy.run_module('runtime_cpu.inspect', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m runtime_cpu.inspect"), (
        done.stderr
    )
