"""The commands that users type, their options and defaults, are those of ``tests/golden/commands.txt``.

A changed option is a decision: ``python -m tests.contracts.commands --write`` writes the file anew.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import textwrap
from pathlib import Path

import pytest

from .commands import GOLDEN, PROJECT, described, file_of, parser_of, recorded_in_a_process
from .source_tree import PRODUCT, Module, committed, expect_nothing, relative

# Started by our own processes, by a file's name: what they take may change together with who starts them.
INTERNAL = {
    "stage_process": "the runner starts a stage with it",
    "worker": "the launcher starts one for each GPU; the engine's bench one for each run",
    "bench_worker": "the engine's bench starts one for each run",
    "node": "the launcher starts one on each node of a run",
    "jail": "the sandbox of generated code",
    "watchdog": "ends the teacher's server when its starter dies",
    "weights": "the synthesize stage converts its teacher's weights with it",
}


def runs_by_itself(module: Module) -> bool:
    """Whether ``python -m`` does something with a file: it is a ``__main__``, or asks whether it is."""
    asked = {"__name__", "'__main__'"}
    asks = any(
        isinstance(node, ast.Compare)
        and asked <= {ast.unparse(side) for side in (node.left, *node.comparators)}
        for node in module.nodes
    )
    return asks or module.path.endswith("/__main__.py")


def test_commands_and_their_options_are_the_recorded_ones() -> None:
    now, _ = recorded_in_a_process()
    changed = difflib.unified_diff(
        GOLDEN.read_text().splitlines(), now.splitlines(), "recorded", "now", lineterm=""
    )
    expect_nothing(changed)


def test_every_file_that_runs_by_itself_is_a_recorded_command_or_internal() -> None:
    known = set(recorded_in_a_process()[1])
    modules = [
        Module(relative(path), path.read_text()) for path in committed(*(f"{room}/*.py" for room in PRODUCT))
    ]
    own = {module.path for module in modules if runs_by_itself(module)}
    expect_nothing(sorted(path for path in own - known if Path(path).stem not in INTERNAL))
    assert known and known <= own


def lines(parser: argparse.ArgumentParser) -> str:
    return "\n".join(described(parser, ""))


def test_every_kind_of_argument_is_described() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, nargs="?", default=PROJECT / "runs/x")
    parser.add_argument("-n", "--number", type=int, default=3, choices=[1, 3])
    parser.add_argument("--pair", metavar=("A", "B"), nargs=2, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--level", action="store_const", const=7)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--quiet", action="store_true")
    one.add_argument("--colour", action=argparse.BooleanOptionalAction)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list").add_argument("NAME")
    assert lines(parser) == textwrap.dedent(
        """\
        model: Path; takes ?; default runs/x
        -n, --number NUMBER: int; one of [1, 3]; default 3
        --pair A B: takes 2; required
        --set SET -> overrides: append; default []
        --level: store const; gives 7
        --quiet: store true; default False; excludes others of group 1
        --colour, --no-colour: boolean optional; excludes others of group 1
        command: one of list; required
          list
            NAME"""
    ).replace("--set SET", "--set OVERRIDES")


@pytest.mark.parametrize(
    "change",
    [
        {"default": 4},
        {"type": float},
        {"choices": [3, 4]},
        {"required": True},
        {"nargs": "+"},
        {"metavar": "M"},
        {"dest": "count"},
    ],
)
def test_a_changed_option_is_seen(change: dict[str, object]) -> None:
    before, after = argparse.ArgumentParser(), argparse.ArgumentParser()
    usual: dict[str, object] = {"type": int, "default": 3}
    before.add_argument("--number", **usual)  # type: ignore[arg-type]
    after.add_argument("--number", **{**usual, **change})  # type: ignore[arg-type]
    assert lines(before) != lines(after)


def test_a_changed_help_text_is_not() -> None:
    before, after = argparse.ArgumentParser(), argparse.ArgumentParser(description="other")
    before.add_argument("--number", help="a number")
    after.add_argument("--number", help="how many")
    assert lines(before) == lines(after)


def test_a_command_that_is_not_there_or_parses_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LookupError, match=r"python -m tests\.nowhere is not there"):
        file_of("tests.nowhere")
    (tmp_path / "parses_nothing.py").write_text("import json")
    (tmp_path / "swallows.py").write_text(
        "import argparse\ndef main():\n    try:\n        argparse.ArgumentParser(prog='me').parse_args()\n"
        "    except Exception:\n        pass\n    raise SystemExit('went on')\nmain()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LookupError, match="parses_nothing parsed no arguments"):
        parser_of("parses_nothing")
    assert parser_of("swallows").prog == "me"


@pytest.mark.parametrize(
    ("path", "text", "runs"),
    [
        ("flows/a.py", "if __name__ == '__main__':\n    main()", True),
        ("flows/a.py", 'if "__main__" == __name__: main()', True),
        ("flows/__main__.py", "main()", True),
        ("flows/a.py", "'if __name__ == \"__main__\"'", False),
        ("flows/a.py", "if __name__ == 'flows.a': main()", False),
    ],
)
def test_a_file_that_runs_by_itself_is_known(path: str, text: str, runs: bool) -> None:
    assert runs_by_itself(Module(path, text)) == runs
