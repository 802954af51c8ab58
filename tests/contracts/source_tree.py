"""The project's Python sources as a tree of modules, and who imports whom: what the tests of this folder share.

``SourceTree.committed("flows", "model").arrows`` maps each module to the modules that it imports. Imports count
wherever they stand: at the top, within functions, under ``TYPE_CHECKING``, and by name through ``importlib``.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PRODUCT = ("flows", "components", "model", "runtime_cpu")
_IMPORTERS = {"importlib.import_module", "importlib.__import__", "runpy.run_module", "pkgutil.resolve_name"}


@lru_cache
def committed(*patterns: str) -> tuple[Path, ...]:
    """Files that git tracks, and that exist in the checkout; all without patterns."""
    done = subprocess.run(
        ["git", "-C", str(PROJECT), "ls-files", "-z", "--", *patterns], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    names = sorted(name for name in done.stdout.decode().split("\0") if name)
    return tuple(path for name in names if (path := PROJECT / name).is_file())


def relative(path: Path) -> str:
    """A committed file's name below the project, with slashes."""
    return path.relative_to(PROJECT).as_posix()


def expect_nothing(found: Iterable[str]) -> None:
    """Fails with one finding a line, all of them: pytest would cut a long list."""
    lines = list(found)
    if lines:
        pytest.fail("\n".join([f"{len(lines)} found:", *lines]), pytrace=False)


@dataclass(frozen=True)
class Import:
    """One imported thing: ``from module import name``, or ``import module`` (no name). Both are absolute."""

    line: int
    module: str
    name: str = ""

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}" if self.name and self.name != "*" else self.module


@dataclass(frozen=True)
class Module:
    """One source file. ``path`` is below the project, with slashes."""

    path: str
    text: str

    @property
    def name(self) -> str:
        parts = self.path.rpartition(".")[0].split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_package(self) -> bool:
        return self.path.endswith(("/__init__.py", "/__init__.pyi"))

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @cached_property
    def syntax(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """The whole syntax, a node before those within it."""
        return tuple(ast.walk(self.syntax))

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(_imports(self.nodes, self.package))


def absolute(package: str, level: int, module: str) -> str:
    """The full name of what ``from ...module import`` names in a package (``level`` dots)."""
    if not level:
        return module
    parts = package.split(".")
    base = parts[: len(parts) - level + 1]
    return ".".join([*base, *([module] if module else [])])


def _text(node: ast.expr | None, constants: Mapping[str, str]) -> tuple[str, bool]:
    """The known beginning of an expression's text, and whether it is the whole text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value, True
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id], True
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, whole = _text(node.left, constants)
        right, whole_right = _text(node.right, constants) if whole else ("", False)
        return left + right, whole and whole_right
    if isinstance(node, ast.JoinedStr):
        known = ""
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            said, whole = _text(inner, constants)
            known += said
            if not whole:
                return known, False
        return known, True
    return "", False


def _within(name: str, module: str | None) -> bool:
    return name.rpartition(".")[0] == module


def _names(nodes: tuple[ast.AST, ...], package: str) -> tuple[dict[str, str], dict[str, str]]:
    """What a file calls things: imported names in full, and the text of names bound to one constant."""
    full, constants = {}, {"__name__": "", "__package__": package}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                full[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}"
            if any(alias.name == "*" for alias in node.names):
                full.update(
                    {name.rpartition(".")[2]: name for name in _IMPORTERS if _within(name, node.module)}
                )
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    constants[target.id] = node.value.value
    return full, constants


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain on a name; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def _imports(nodes: tuple[ast.AST, ...], package: str) -> Iterator[Import]:
    full, constants = _names(nodes, package)
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(package, node.level, node.module or "")
            for alias in node.names:
                yield Import(node.lineno, module, alias.name)
        elif isinstance(node, ast.Call) and (called := dotted(node.func)):
            head, _, rest = called.partition(".")
            called = ".".join(filter(None, [full.get(head, head), rest]))
            if called not in _IMPORTERS and called != "__import__":
                continue
            given = {word.arg: word.value for word in node.keywords if word.arg}
            first = node.args[0] if node.args else given.get("name", given.get("mod_name"))
            said, whole = _text(first, constants)
            if not whole:  # f"package.{name}": some module of the package, so at least the package
                said = said.rpartition(".")[0]
            if said.startswith("."):
                anchor = node.args[1] if len(node.args) > 1 else given.get("package")
                base = _text(anchor, constants)[0] or package
                stripped = said.lstrip(".")
                said = absolute(base, len(said) - len(stripped), stripped)
            module, _, attribute = said.partition(":")
            if module:
                yield Import(node.lineno, module, attribute)


def _at_top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's own statements, those under ``if`` and ``try`` included."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _at_top(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _at_top(handler.body)


@cache
def _read(path: str, text: str) -> Module:
    """One module object for one text: what was read of it once serves every tree that holds it."""
    return Module(path, text)


@dataclass(frozen=True)
class SourceTree:
    """Modules by full name; made of ``{path: text}`` or of committed files."""

    files: Mapping[str, str] = field(hash=False)

    @classmethod
    @cache
    def committed(cls, *rooms: str) -> SourceTree:
        patterns = [f"{room}/*.{ending}" for room in rooms for ending in ("py", "pyi")]
        return cls({relative(path): path.read_text() for path in committed(*patterns)})

    @cached_property
    def modules(self) -> dict[str, Module]:
        found = (_read(path, text) for path, text in sorted(self.files.items()))
        return {module.name: module for module in found}

    def bound(self, module: str) -> set[str]:
        """Names that a module's top level binds to anything but its own submodules."""
        names: set[str] = set()
        for node in _at_top(self.modules[module].syntax.body):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(target.id for target in targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.ImportFrom):
                base = absolute(self.modules[module].package, node.level, node.module or "")
                for alias in node.names:
                    if f"{base}.{alias.name}" != f"{module}.{alias.asname or alias.name}":
                        names.add(alias.asname or alias.name)
        return names

    def resolve(self, found: Import) -> set[str]:
        """Modules of this tree that an import loads for its names.

        ``from p import name`` is the submodule ``p.name`` where there is one, else ``p`` itself (its ``__init__``);
        both, where ``__init__`` gives the submodule's name to something else. The packages above an imported module
        do not count: a package that imports its own submodules, which import each other, is no cycle.
        """
        submodule = f"{found.module}.{found.name}"
        if found.module not in self.modules:
            if found.name:  # a folder without __init__; else an extension module, or nothing: no file of ours
                return {submodule} & self.modules.keys()
            parts = found.module.split(".")
            above = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
            return {next((known for known in above if known in self.modules), "")} - {""}
        if found.name and submodule in self.modules:
            return {submodule, found.module} if found.name in self.bound(found.module) else {submodule}
        return {found.module}

    @cached_property
    def arrows(self) -> dict[str, dict[str, int]]:
        """For every module, the modules that it imports, each with the first line that does."""
        arrows: dict[str, dict[str, int]] = {}
        for name, module in self.modules.items():
            arrows[name] = {}
            for found in module.imports:
                for target in sorted(self.resolve(found)):
                    first = arrows[name].get(target, found.line)
                    arrows[name][target] = min(first, found.line)
        return arrows
