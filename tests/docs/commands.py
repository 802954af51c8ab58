"""Command lines of the docs against the parsers of the programs that they call; nothing is run.

``commands(text)`` cuts a shell block into words by command. ``problem(words)`` says what is wrong with one.
``python -m tests.docs.commands`` does so for a JSON list of lists of words: the programs import what they please.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("flows", "components", "model", "runtime_cpu")
FOLDERS = (*PACKAGES, "docs", "infra", "tests")
# Of the system or of another project; that the word is a program is all that is checked.
OTHERS = {
    "apt-get",
    "cp",
    "curl",
    "export",
    "git",
    "install",
    "pip",
    "prefect",
    "printf",
    "systemctl",
    "uv",
    "vllm",
}
_OPERATORS = {"|", "||", "&&", ";", "&"}
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)


class _Parsed(BaseException):
    """The arguments are in order; no ``except Exception`` of a command may catch it."""


class _PassedOn(BaseException):
    """The command would start another one with ``words``."""

    def __init__(self, words: list[str]) -> None:
        self.words = words


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command: comments, redirections of the whole line and operators are cut off."""
    text = re.sub(r"\\\n|(?<=\||&)[ \t]*\n", " ", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in _OPERATORS:
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def problem(words: list[str], mentioned: bool = False) -> str | None:
    """What is wrong with a command; a ``mentioned`` one may leave out required arguments."""
    while words and (words[0] == "sudo" or _ASSIGNMENT.fullmatch(words[0])):
        words = words[1:]
    if not words:
        return None
    for word in words:
        if word.split("/")[0] in FOLDERS and "/" in word and not (PROJECT / word).exists():
            return f"there is no {word}"
    program, arguments = words[0].rsplit("/", 1)[-1], words[1:]
    if program in ("python", "python3"):
        if arguments[:1] != ["-m"]:
            return f"python {arguments[0] if arguments else ''}: only python -m is known here"
        return _module_problem(arguments[1], arguments[2:], mentioned)
    if program == "smallthinker":  # the engine's console script
        return _module_problem("runtime_cpu", arguments, mentioned)
    if program == "make":
        return _make_problem(arguments)
    if program == "cmake":
        return _cmake_problem(arguments)
    if program == "pytest" or words[0].startswith(("build/", "infra/")) or program in OTHERS:
        return None
    return f"{program!r} is no program that the docs may call; see tests/docs/commands.py"


def _module_problem(module: str, arguments: list[str], mentioned: bool) -> str | None:
    """What the module's own parser has against ``arguments``."""
    if module.rpartition(".")[2].isupper():  # stands for any of them
        return None
    if module.partition(".")[0] not in PACKAGES:
        return None if importlib.util.find_spec(module.partition(".")[0]) else f"there is no module {module}"
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if mentioned:
            for action in parser._actions:
                action.required = False
        parse(parser, args, namespace)
        raise _Parsed

    start = subprocess.Popen.__init__

    def pass_on(process: Any, words: Any, *args: Any, **kwargs: Any) -> None:
        if words[0] == sys.executable:
            raise _PassedOn(words)
        start(process, words, *args, **kwargs)

    said = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        mock.patch.object(subprocess.Popen, "__init__", pass_on),
        mock.patch.object(sys, "argv", [module, *arguments]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except _Parsed:
            return None
        except _PassedOn as other:
            return problem(other.words, mentioned)
        except ImportError as error:
            return str(error)
        except SystemExit as end:
            return said.getvalue() if end.code else None
    return f"python -m {module} parsed no arguments"


def _make_problem(arguments: list[str]) -> str | None:
    """Whether the Makefile has the targets, and whether what they run would accept the variables."""
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr
    for line in done.stdout.splitlines():
        if line.startswith(".venv/bin/python -m ") and (found := problem(next(commands(line)))):
            return found
    return None


def _cmake_problem(arguments: list[str]) -> str | None:
    """Whether CMakeLists.txt has the options of ours."""
    text = (PROJECT / "CMakeLists.txt").read_text()
    for name in re.findall(r"-D(SMALLTHINKER_\w+)", " ".join(arguments)):
        if not re.search(rf"\b{name}\b", text):
            return f"CMakeLists.txt has no {name}"
    return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps([problem(*entry) for entry in json.load(sys.stdin)]))
