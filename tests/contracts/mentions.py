"""File, module and command names in documents and comments, and which of them stand for nothing.

``unknown_names(Repository(files), path)`` lists what one file says of the project's files that is not so.
"""

from __future__ import annotations

import ast
import fnmatch
import itertools
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property

from .commands import COMMANDS, WITHOUT_OPTIONS
from .source_tree import Module, SourceTree
from .test_includes import SOURCES

TOP = ("flows", "components", "model", "runtime_cpu", "infra", "docs", "tests")
PACKAGES = ("flows", "components", "model", "runtime_cpu", "tests")
# What people write by hand. Pictures, pages and data are also made by runs, so only their paths below docs are checked.
SOURCE = ("pyi", "py", "cpp", "hpp", "h", "sh", "toml", "yaml", "md", "sbatch", "service", "svg", "j2")
MADE = ("png", "html")
# Made by a run, a build or a user, or lying outside the project.
NOT_COMMITTED = ("runs/", "build/", ".venv", "hf/", "models/", "dist/")
# Files of others that our texts name, and where they are.
OF_OTHERS = {
    "llama.cpp": "the project of that name",
    "ggml.h": "llama.cpp's tensor types",
    "ggml-common.h": "llama.cpp's block types",
    "asm/hwcap.h": "Linux",
    "asm/unistd.h": "Linux",
    "linux/prctl.h": "Linux",
    "malloc.h": "glibc",
    "stage_1_and_2.py": "DeepSpeed's optimiser",
    "torch/serialization.py": "PyTorch's file format",
    "utils.py": "the name that no module here has",
}
SPOKEN_LOUDLY = ("README", "CHANGELOG", "CONTRIBUTING", "LICENSE")
_ENDINGS = "|".join((*SOURCE, *MADE))
_PATH = re.compile(
    rf"(?<![\w./~$<@{{-])(?P<name>(?:[\w.+*{{}},<>-]+/)*[\w.*{{}},<>-]*\.(?:{_ENDINGS}))(?![\w/-]|\.\w)"
)
_FOLDER = re.compile(rf"(?<![\w./~$<@{{-])(?P<name>(?:{'|'.join(TOP)})/[\w./*{{}},<>-]+)")
_DOTTED = re.compile(rf"(?<![\w./$<@{{-])(?P<name>(?:{'|'.join(PACKAGES)})(?:\.\w+)+(?::\w+)?)(?![\w/<{{*])")
_COMMAND = re.compile(
    r"(?:\bpython3?|\$\(PY\)|\bpython3?[\d.]*|\{python\}) (?:-[a-zA-Z]+ )*-m (?P<name>[\w.]+)"
)
_COMMAND_LIST = re.compile(r"[\"']-m[\"'],\s*[\"'](?P<name>[\w.]+)[\"']")
_URL = re.compile(r"\b[a-z]+://[^\s)>\"'`]+")
_LINK = re.compile(
    r"(?<!\\)!?\[[^\]]*\]\(\s*<?(?P<target>[^)\s>]*)>?(?:\s+[\"'][^)]*)?\)"
    r"|^\s*\[[^\]^]+\]:\s*<?(?P<other>[^\s>]+)",
    re.MULTILINE,
)
_TARGET = re.compile(r"\]\([^)\n]*\)")
_HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*\b(?:href|src)=[\"'](?P<target>[^\"']+)[\"']")
_FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1", re.MULTILINE | re.DOTALL)


def _blank(match: re.Match[str]) -> str:
    """The same number of lines, with nothing in them."""
    return "\n" * match.group(0).count("\n")


# Comments, and the literals that may hold what looks like one.
_CPP = re.compile(r"(//[^\n]*|/\*.*?\*/)|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
_PYTHON = re.compile(
    r"(\#[^\n]*)|(\"\"\"|\'\'\')(?:\\.|.)*?\2|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL
)


def _comments(pattern: re.Pattern[str], text: str) -> list[str]:
    """The comments of each line."""
    lines, line, end = [""] * (text.count("\n") + 1), 0, 0
    for match in pattern.finditer(text):
        line += text.count("\n", end, match.start())
        end = match.start()
        for number, said in enumerate((match.group(1) or "").split("\n"), line):
            lines[number] += f" {said}"
    return lines


def prose(module: Module) -> str:
    """What a file says to people, on the lines where it does: a program's comments and docstrings, others whole."""
    if module.path.endswith((".cpp", ".hpp", ".h")):
        return "\n".join(_comments(_CPP, module.text))
    if not module.path.endswith((".py", ".pyi")):
        return module.text
    lines, source = _comments(_PYTHON, module.text), module.text.split("\n")
    for node in module.nodes:
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = f" {source[number]}"
    return "\n".join(lines)


def _choices(name: str) -> list[str]:
    """What ``{a,b}`` stands for."""
    parts = [
        part[1:-1].split(",") if part[:1] == "{" else [part]
        for part in re.split(r"(\{[^{}]*,[^{}]*\})", name)
    ]
    return ["".join(choice) for choice in itertools.product(*parts)]


def _placeholder(name: str) -> bool:
    """``<stage>/config.py``, ``{host}.toml``, ``NAME.py``, ``NNNN-x.md``: no name of one file."""
    parts = [part.partition(".")[0] for part in name.split("/")]
    return bool(re.search(r"[<>{}…]|(?<![A-Za-z])NN+(?![A-Za-z])", name)) or any(
        part.isupper() and part not in SPOKEN_LOUDLY for part in parts
    )


class Repository:
    """The project's files by path, with what can be asked of them."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)
        self.tree = SourceTree({path: text for path, text in files.items() if path.endswith((".py", ".pyi"))})
        self._of_path = {module.path: module for module in self.tree.modules.values()}
        self._known: dict[str, set[str]] = {}
        self._said: dict[str, str] = {}

    @cached_property
    def folders(self) -> set[str]:
        return {
            "/".join(parts[:n])
            for path in self.files
            for parts in [path.split("/")]
            for n in range(1, len(parts))
        }

    @cached_property
    def base_names(self) -> set[str]:
        return {posixpath.basename(path) for path in self.files}

    def has(self, name: str, here: str) -> bool:
        """Whether a path (a pattern with ``*``) is a file or folder, seen from the root or from the file ``here``."""
        if "/" not in name and "*" not in name:
            return name in self.base_names or f"{posixpath.dirname(here)}/{name}".lstrip("/") in self.folders
        bases = ["", posixpath.dirname(here), SOURCES, "runtime_cpu", "components"]
        for base in bases:
            full = posixpath.normpath(posixpath.join(base, name))
            if full in self.files or full in self.folders:
                return True
            if "*" in full and any(fnmatch.fnmatchcase(each, full) for each in (*self.files, *self.folders)):
                return True
        return "/" not in name and any(fnmatch.fnmatchcase(each, name) for each in self.base_names)

    def _members(self, name: str) -> set[str]:
        """Every name that is defined in a module at any depth: functions, classes, variables, attributes."""
        if name not in self._known:
            found = self._known[name] = set()
            for node in self.tree.modules[name].nodes:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    found.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.add(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
                elif isinstance(node, ast.ImportFrom):
                    found.update(alias.asname or alias.name for alias in node.names)
        return self._known[name]

    def said(self, path: str) -> str:
        """The prose of a file, without addresses."""
        if path not in self._said:
            module = self._of_path.get(path) or Module(path, self.files[path])
            self._said[path] = _URL.sub("", prose(module))
        return self._said[path]

    def resolves(self, dotted: str) -> bool:
        """Whether ``package.module.Class.method`` is there."""
        name, _, function = dotted.partition(":")
        parts = [*name.split("."), *([function] if function else [])]
        for length in range(len(parts), 0, -1):
            module = ".".join(parts[:length])
            if module in self.tree.modules:
                return all(part in self._members(module) for part in parts[length:])
        return parts[0] in self.folders and len(parts) == 1

    def runs(self, command: str) -> bool:
        """Whether ``python -m command`` does something."""
        return (
            command in (*COMMANDS, *WITHOUT_OPTIONS)
            or f"{command}.__main__" in self.tree.modules
            or (command in self.tree.modules and not self.tree.modules[command].is_package)
        )

    def headings(self, path: str) -> set[str]:
        """A document's anchors, as GitHub makes them of its headings, and those set by hand."""
        text, seen, found = _FENCE.sub(_blank, self.files[path]), Counter[str](), set()
        for match in re.finditer(
            r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$|^(\S.*)\n {0,3}(?:=+|-{2,})\s*$", text, re.MULTILINE
        ):
            title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", match.group(1) or match.group(2) or "")
            slug = re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-")
            found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
            seen[slug] += 1
        return found | set(re.findall(r"<[^>]*\b(?:id|name)=[\"']([^\"']+)[\"']", text))


def _places(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    for match in pattern.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match["name"]


def unknown_paths(repository: Repository, path: str) -> list[str]:
    """Paths and bare file names that are no file."""
    text, found = repository.said(path), []
    if path.endswith(".md"):
        text = _TARGET.sub("]", text)  # broken_links() follows these
    for line, name in _places(_PATH, text):
        for choice in _choices(name):
            made = choice.endswith(MADE) and not posixpath.normpath(choice).startswith("docs/")
            if made or _placeholder(choice) or choice.startswith(NOT_COMMITTED) or choice in OF_OTHERS:
                continue
            if re.fullmatch(r"\**\.\w+", choice):
                continue  # an ending: .py, *.py
            if not repository.has(choice, path):
                found.append(f"{path}:{line}: no file {choice}")
    for line, name in _places(_FOLDER, text):
        name = name.rstrip(".,/-")
        if all(part in TOP for part in name.split("/")):
            continue
        for choice in _choices(name):
            ending = (
                posixpath.basename(choice).rpartition(".")[2] if "." in posixpath.basename(choice) else ""
            )
            if _placeholder(choice) or ending or choice.startswith("model/"):
                continue
            if not repository.has(choice, path):
                found.append(f"{path}:{line}: no folder or file {choice}")
    return found


def unknown_modules(repository: Repository, path: str) -> list[str]:
    """Dotted names that begin with a package of ours and are neither a module nor something in one."""
    found = []
    for line, name in _places(_DOTTED, _COMMAND.sub("", repository.said(path))):
        parts = re.split(r"[.:]", name)
        if parts[-1] in (*SOURCE, *MADE) or parts[1].isupper():  # a file's name; runtime_cpu.NAME
            continue
        # `model` is also what people call a model: only a module's own names are checked.
        if parts[0] == "model" and f"model.{parts[1]}" not in repository.tree.modules:
            continue
        if name not in COMMANDS and name not in WITHOUT_OPTIONS and not repository.resolves(name):
            found.append(f"{path}:{line}: no module or name {name}")
    return found


def unknown_commands(repository: Repository, path: str) -> list[str]:
    """``python -m X``, anywhere in a file, where X is ours and does not run."""
    text, found = repository.files[path], []
    for pattern in (_COMMAND, _COMMAND_LIST):
        for line, said in _places(pattern, text):
            name = said.rstrip(".")  # of runtime_cpu.{name} the package; the end of a sentence
            placeholder = name.rpartition(".")[2].isupper()
            if name.partition(".")[0] in PACKAGES and not placeholder and not repository.runs(name):
                found.append(f"{path}:{line}: python -m {name} runs nothing")
    return found


def broken_links(repository: Repository, path: str) -> list[str]:
    """Links of a document to a file or heading that is not there."""
    text = re.sub(
        r"(`+)[^\n]*?\1", lambda match: " " * len(match.group(0)), _FENCE.sub(_blank, repository.files[path])
    )
    found = []
    for pattern in (_LINK, _HTML_LINK):
        for match in pattern.finditer(text):
            target = next(filter(None, match.groupdict().values()), "")
            line = text.count("\n", 0, match.start()) + 1
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            there = posixpath.normpath(posixpath.join(posixpath.dirname(path), name)) if name else path
            if not target or (there not in repository.files and there not in repository.folders):
                found.append(f"{path}:{line}: no file for the link {target}")
            elif anchor and there.endswith(".md") and anchor not in repository.headings(there):
                found.append(f"{path}:{line}: no heading for the link {target}")
    return found
