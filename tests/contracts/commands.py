"""The commands that a user types and their options, as text: ``python -m tests.contracts.commands --write``.

Each command is started as ``python -m NAME`` starts it and stopped where it would parse its arguments; the parser's
actions are written down, not its help, whose layout differs between versions of Python. ``tests/golden/commands.txt``
holds the result: a changed option is a decision, shown by a changed line there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = PROJECT / "tests/golden/commands.txt"
COMMANDS = (
    "flows.pipeline",
    "flows.pretrain",
    "components.sources",
    "components.export.head_study",
    "components.pretraining.benchmark",
    "components.pretraining.dry_run",
    "components.pretraining.kernel_proofs.compile",
    "components.pretraining.kernel_proofs.on_gpu",
    "components.pretraining.long_context",
    "components.pretraining.replay",
    "components.pretraining.specialisation",
    "components.pretraining.studies.data_wait",
    "components.pretraining.studies.router_lead",
    "components.pretraining.studies.anneal",
    "runtime_cpu.bench",
    "runtime_cpu.chat",
    "runtime_cpu.head",
    "runtime_cpu.inspect",
    "runtime_cpu.logits",
    "runtime_cpu.pack",
    "runtime_cpu.perplexity",
    "runtime_cpu.reads",
    "runtime_cpu.serve",
    "runtime_cpu.synth",
)
# Typed by users as well, but without options: they read their arguments in order, and run when there are none.
WITHOUT_OPTIONS = ("runtime_cpu", "runtime_cpu.bench_machine")


class _Reached(BaseException):
    """Parsing began; no ``except Exception`` of a command may catch it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _plain(value: Any) -> str:
    """A default as text that is the same on every machine and version."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, Path):
        value = value.relative_to(PROJECT) if value.is_relative_to(PROJECT) else value
        return str(value.as_posix())
    return repr(value)


def _kind(action: argparse.Action) -> str:
    """What an option does with what follows it: ``int``, ``flag``, ``count``, …"""
    name = type(action).__name__.strip("_").removesuffix("Action")
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    kind = getattr(action.type, "__name__", "") if action.type is not None else ""
    return " ".join(filter(None, [words if words != "store" else "", kind]))


def described(parser: argparse.ArgumentParser, indent: str = "  ") -> Iterator[str]:
    """One line for each argument, in the order in which they were added."""
    exclusive = {
        id(a): n for n, group in enumerate(parser._mutually_exclusive_groups, 1) for a in group._group_actions
    }
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            required = "; required" if action.required else ""
            yield f"{indent}{action.dest}: one of {', '.join(action.choices)}{required}"
            for name, sub in action.choices.items():
                yield f"{indent}  {name}"
                yield from described(sub, indent + "    ")
            continue
        unnamed = action.dest.upper() if action.option_strings else action.dest
        shown = action.metavar if action.metavar is not None else unnamed
        metavar = " ".join(shown) if isinstance(shown, tuple) else shown
        parts = [_kind(action)]
        parts += [f"takes {action.nargs}"] if action.nargs not in (None, 0) else []
        parts += [f"one of {_plain(list(action.choices))}"] if action.choices is not None else []
        parts += (
            [f"default {_plain(action.default)}"] if action.default not in (None, argparse.SUPPRESS) else []
        )
        parts += [f"gives {_plain(action.const)}"] if action.const not in (None, True) else []
        parts += ["required"] if action.required and action.option_strings else []
        parts += [f"excludes others of group {exclusive[id(action)]}"] if id(action) in exclusive else []
        valued = action.nargs != 0 and action.option_strings
        name = ", ".join(action.option_strings) + (f" {metavar}" if valued else "") or metavar
        name += f" -> {action.dest}" if _own_name(action) else ""
        yield f"{indent}{name}: {'; '.join(filter(None, parts))}".rstrip(": ")


def _own_name(action: argparse.Action) -> bool:
    """Whether an option's value has a name that its spelling does not give."""
    long = [text for text in action.option_strings if text.startswith("--")]
    return bool(long) and action.dest != long[0].lstrip("-").replace("-", "_")


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of ``python -m command``; nothing after it is run.

    Raises:
        LookupError: the command ended without parsing arguments.
    """

    def reached(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise _Reached(parser)

    kept = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args, sys.argv
    argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = reached  # type: ignore[assignment]
    sys.argv = [command]
    try:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    except _Reached as stop:
        return stop.parser
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args, sys.argv = kept  # type: ignore[method-assign]
    raise LookupError(f"python -m {command} parsed no arguments")


def file_of(command: str) -> str:
    """The file that ``python -m command`` runs, below the project.

    Raises:
        LookupError: there is none.
    """
    spec = importlib.util.find_spec(command)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{command}.__main__")
    if spec is None or spec.origin is None:
        raise LookupError(f"python -m {command} is not there")
    return Path(spec.origin).relative_to(PROJECT).as_posix()


def recorded(commands: tuple[str, ...] = COMMANDS, without: tuple[str, ...] = WITHOUT_OPTIONS) -> str:
    """Every command with its arguments; one that is not there has a line that says so in their place."""
    lines = []
    for command in sorted({*commands, *without}):
        lines.append(f"python -m {command}")
        try:
            file_of(command)
            lines += (
                ["  arguments in order, no options"] if command in without else described(parser_of(command))
            )
        except (LookupError, ImportError) as error:
            lines.append(f"  error: {error}")
        lines.append("")
    return "\n".join(lines)


@cache
def recorded_in_a_process() -> tuple[str, tuple[str, ...]]:
    """``recorded()`` and the files of the commands, from a new interpreter.

    The commands import what they please and set what they please; this process is left as it was.

    Raises:
        LookupError: the interpreter failed; the message is its last line.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.contracts.commands", "--with-files"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LookupError(done.stderr.strip().splitlines()[-1])
    text, files = json.loads(done.stdout.splitlines()[-1])
    return text, tuple(files)


def _files() -> list[str]:
    found = []
    for command in (*COMMANDS, *WITHOUT_OPTIONS):
        with contextlib.suppress(LookupError, ImportError):
            found.append(file_of(command))
    return found


def main(arguments: list[str]) -> None:
    text = recorded()
    if arguments == ["--write"]:
        GOLDEN.write_text(text)
    elif arguments == ["--with-files"]:
        sys.stdout.write(json.dumps([text, _files()]))
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
