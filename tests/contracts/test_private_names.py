"""What begins with an underscore is used in its own file only, and a library's privates only where listed here."""

# ruff: noqa: E501 - a made-up file takes one line

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache

import pytest

from .source_tree import PRODUCT, Module, SourceTree, absolute, expect_nothing

OURS = (*PRODUCT, "tests")
# The compiled part of the engine; the underscore keeps users from it, not the package.
EXTENSION = "_core"
# Documented parts of named tuples and of the standard library, whatever their names look like.
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_field_defaults", "_exit", "_generate_next_value_"}
_MODES = "PyTorch's fake and dispatch modes are documented for use, in modules with private names only"
_NODES = "nothing else tells which node of autograd runs, and of which forward call it is"
_MASTER = "where DeepSpeed keeps a parameter's piece of the fp32 weights; its public way copies the whole"
_GPU = "what the code that Inductor generates asks of a GPU, answered on a machine without one"
_INDUCTOR = "Inductor's kernels are compiled and run as it does it, without the launch; torch is pinned"
_BF16 = "PyTorch has no public question for a CPU's bf16 instructions"
# Private names of libraries: the name, the files that use it, and why there is no public one.
_LISTED = (
    ("_FastText", "languages.py quality.py", "the class behind fasttext.load_model, which prints a warning"),
    ("_is_avx512_bf16_supported", "ranks.py", _BF16),
    ("_is_amx_tile_supported", "ranks.py", _BF16),
    (
        "_distributed_c10d",
        "ranks.py gpu_checks.py",
        "torch.distributed has HashStore, but its type stubs do not export it",
    ),
    ("_AllToAllV", "expert_parallel.py", "DeepSpeed's exchange of uneven parts with its gradient"),
    ("_hp_mapping", "gradients.py master_weights.py resharding.py", _MASTER),
    ("_subclasses", "dry_run.py training_passes.py", _MODES),
    ("_mode_utils", "step_ledger.py", _MODES),
    ("_python_dispatch", "step_ledger.py", _MODES),
    ("_pytree", "step_ledger.py", _MODES),
    ("_get_sequence_nr", "step_ledger.py", _NODES),
    ("_current_autograd_node", "step_ledger.py", _NODES),
    ("_sequence_nr", "step_ledger.py", _NODES),
    ("_compiled_call_impl", "step_ledger.py", "nothing else tells whether a module is compiled"),
    ("_cdata", "step_ledger.py", "a storage's address, which tells two Python objects of one storage"),
    ("_guards", "step_ledger.py", "nothing else tells whether torch.compile is tracing"),
    ("_guards", "interpreter.py", "nothing else gives a backend the mode that its graph was captured in"),
    ("_dynamo", "fused_regions.py", "the way to a backend of one's own for torch.compile"),
    (
        "_dynamo",
        "compiling.py stage.py",
        "where the number of recompilations is limited, counted and refused",
    ),
    ("_dynamo", "training_passes.py", "where the number of recompilations is limited"),
    ("_dynamo", "targets.py interpreter.py", _GPU),
    ("_C", "targets.py", _GPU),
    ("_triton", "targets.py", _GPU),
    ("_inductor", "targets.py lowering.py interpreter.py compile.py", _INDUCTOR),
    ("_precompile_config", "compile.py", _INDUCTOR),
    ("_ops", "fused_regions.py", "the type of a graph's higher-order operators"),
    ("_deployments", "prefect_short_names.py", "the classes whose look-up of a deployment's name is wrapped"),
)
OF_LIBRARIES = {(file, name): reason for name, files, reason in _LISTED for file in files.split()}

_BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller"}


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def _ours(module: str) -> bool:
    return module.partition(".")[0] in OURS


class Definitions(ast.NodeVisitor):
    """Private names that a file defines: variables, functions, classes, and attributes of its own objects."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._within_functions = 0

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.names.add(node.name)
        self._within_functions += 1
        self.generic_visit(node)
        self._within_functions -= 1

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.add(node.name)
        outer, self._within_functions = self._within_functions, 0
        self.generic_visit(node)
        self._within_functions = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store) and not self._within_functions:  # a local variable is no attribute
            self.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Store) and _is_self(node.value):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Name) and target.id == "__slots__" for target in node.targets):
            self._add_texts(node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("namedtuple", "NamedTuple", "make_dataclass"):
            for argument in node.args:
                self._add_texts(argument)
        if called in ("setattr", "__setattr__") and len(node.args) > 1 and _is_self(node.args[0]):
            self._add_texts(node.args[1])
        self.generic_visit(node)

    def _add_texts(self, value: ast.expr) -> None:
        for part in ast.walk(value):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                self.names.update(part.value.replace(",", " ").split())


def _is_self(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("super", "type")
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _class_names(annotation: ast.expr | None) -> set[str]:
    """Names within a type: ``Engine`` of ``"Engine | None"``, ``Optional[Engine]``, ``engine.Engine``."""
    if annotation is None:
        return set()
    found = set()
    for part in ast.walk(annotation):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            try:
                found |= _class_names(ast.parse(part.value, mode="eval").body)
            except SyntaxError:
                continue
        elif isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            found.add(part.attr)
    return found


class _File:
    """One module with what its names stand for."""

    def __init__(self, module: Module) -> None:
        self.module = module
        visitor = Definitions()
        visitor.visit(module.syntax)
        self.defined = {name for name in visitor.names if is_private(name)}
        self.classes = {node.name for node in module.nodes if isinstance(node, ast.ClassDef)}
        self.imported: dict[str, str] = {}  # what the file calls an import: the import's full name
        for node in module.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.imported[name] = alias.name if alias.asname else name
            elif isinstance(node, ast.ImportFrom):
                base = absolute(module.package, node.level, node.module or "")
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{base}.{alias.name}"

    def _is_foreign(self, classes: set[str]) -> bool:
        """Whether a value is of a class from another file of ours (and may be of none of this file's)."""
        return not classes & self.classes and any(_ours(self.imported.get(name, "")) for name in classes)

    def _made_by(self, value: ast.expr | None, arguments: Mapping[str, bool]) -> bool:
        """Whether a value is an imported class's ``Class(...)`` or ``Class.open(...)``, or a name of such a value."""
        if isinstance(value, ast.Call):
            function = value.func
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                return function.value.id[:1].isupper() and self._is_foreign({function.value.id})
            return (
                isinstance(function, ast.Name)
                and function.id[:1].isupper()
                and self._is_foreign({function.id})
            )
        return isinstance(value, ast.Name) and arguments.get(value.id, False)

    @cached_property
    def foreign(self) -> dict[ast.AST, set[str]]:
        """By function or class: the names (``engine``, ``self.engine``) whose values are of another file's class."""
        found: dict[ast.AST, set[str]] = {}
        for scope in self.module.nodes:
            if not isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                continue
            names: dict[str, bool] = {}
            for node in ast.walk(scope):
                if (
                    isinstance(node, ast.arg)
                    and node.annotation is not None
                    and not isinstance(scope, ast.Module)
                ):
                    names[node.arg] = self._is_foreign(_class_names(node.annotation))
            for node in ast.walk(scope):
                if isinstance(node, ast.AnnAssign):
                    names[ast.unparse(node.target)] = self._is_foreign(_class_names(node.annotation))
                    if isinstance(scope, ast.ClassDef) and isinstance(node.target, ast.Name):
                        names[f"self.{node.target.id}"] = names[node.target.id]
                elif isinstance(node, ast.Assign):
                    for target in node.targets:
                        names[ast.unparse(target)] = self._made_by(node.value, names)
                elif isinstance(node, (ast.With, ast.AsyncWith)):
                    for item in node.items:
                        if item.optional_vars is not None:
                            names[ast.unparse(item.optional_vars)] = self._made_by(item.context_expr, names)
            within = isinstance(scope, ast.ClassDef)  # another method's variables are not this one's
            found[scope] = {
                name
                for name, foreign in names.items()
                if foreign and (name.startswith("self.") or not within)
            }
        return found

    def accesses(self) -> Iterator[tuple[int, str, str, bool]]:
        """Line, what is accessed, the private name, and whether it is certainly of another file of ours."""
        if not re.search(r"""[.'"]_\w""", self.module.text):
            return
        yield from self._walk(self.module.syntax, (self.module.syntax,))

    def _walk(self, node: ast.AST, scopes: tuple[ast.AST, ...]) -> Iterator[tuple[int, str, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute) and is_private(child.attr) and not _is_self(child.value):
                yield child.lineno, ast.unparse(child), child.attr, self._certain(child.value, scopes)
            elif isinstance(child, ast.Call):
                yield from self._by_name(child, scopes)
            yield from self._walk(child, (*scopes, child) if child in self.foreign else scopes)

    def _by_name(self, call: ast.Call, scopes: tuple[ast.AST, ...]) -> Iterator[tuple[int, str, str, bool]]:
        """``getattr(x, "_name")`` and its like; also ``monkeypatch.setattr(x, "_name", value)``."""
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if called not in _BY_NAME:
            return
        for position, argument in enumerate(call.args[:2]):
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                for name in filter(is_private, argument.value.split(".")):
                    if position == 0 or not _is_self(call.args[0]):
                        certain = position == 1 and self._certain(call.args[0], scopes)
                        yield call.lineno, ast.unparse(call), name, certain or _ours(argument.value)

    def _certain(self, value: ast.expr, scopes: tuple[ast.AST, ...]) -> bool:
        text = ast.unparse(value)
        head = text.partition(".")[0]
        if _ours(self.imported.get(head, "")) and (
            isinstance(value, ast.Name) or text in self.imported.values()
        ):
            return True
        if any(text in self.foreign[scope] for scope in scopes[1:] or scopes):
            return True
        return isinstance(value, ast.Call) and self._made_by(value, {})

    def imports(self) -> Iterator[tuple[int, str, str]]:
        """Line, full name and the private part of it, of everything private that is imported."""
        for found in self.module.imports:
            private = [name for name in found.dotted.split(".") if is_private(name)]
            if private:
                yield found.line, found.dotted, private[-1]


def private_uses(tree: SourceTree) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Uses of another file's private names, and (file, name, sentence) of those of libraries."""
    files = {name: _File(module) for name, module in tree.modules.items()}
    elsewhere: dict[str, set[str]] = {}
    for path, file in files.items():
        for name in file.defined:
            elsewhere.setdefault(name, set()).add(path)
    ours: list[str] = []
    libraries: list[tuple[str, str, str]] = []
    for file in files.values():
        path = file.module.path
        for line, text, name in file.imports():
            if not _ours(text):
                libraries.append((path, name, f"{path}:{line}: {text}"))
            elif name != EXTENSION:
                ours.append(f"{path}:{line}: imports {text}")
        for line, text, name, certain in file.accesses():
            if certain and name != EXTENSION:
                ours.append(f"{path}:{line}: {text}")
            elif name in file.defined or name in PUBLIC or name == EXTENSION:
                continue
            elif name in elsewhere and (path.rpartition("/")[2], name) not in OF_LIBRARIES:
                ours.append(f"{path}:{line}: {text}, of {' or '.join(sorted(elsewhere[name]))}")
            else:
                libraries.append((path, name, f"{path}:{line}: {text}"))
    # Of torch._C._autograd._get_sequence_nr the last name says it all.
    texts = [said for _, _, said in libraries]
    return ours, [each for each in libraries if not any(said.startswith(f"{each[2]}._") for said in texts)]


def unlisted(libraries: list[tuple[str, str, str]]) -> list[str]:
    return [said for path, name, said in libraries if (path.rpartition("/")[2], name) not in OF_LIBRARIES]


@lru_cache
def of_the_product() -> tuple[list[str], list[tuple[str, str, str]]]:
    return private_uses(SourceTree.committed(*PRODUCT))


def test_no_file_uses_a_private_name_of_another() -> None:
    expect_nothing(of_the_product()[0])


def test_private_names_of_libraries_are_listed_with_a_reason() -> None:
    libraries = of_the_product()[1]
    expect_nothing(unlisted(libraries))
    used = {(path.rpartition("/")[2], name) for path, name, _ in libraries}
    assert set(OF_LIBRARIES) - used == set(), "listed, and used no longer"


OTHER = {
    "flows/other.py": "class Other:\n    _kept: int\n    def _do(self):\n        self._made = 1\n_LIMIT = 3\ndef _helper(): ..."
}


@pytest.mark.parametrize(
    "text",
    [
        "from flows.other import _LIMIT",
        "from .other import _helper as helper",
        "from flows import other\nother._LIMIT",
        "from . import other as o\nx = o._helper()",
        "import flows.other\nflows.other._helper()",
        "import flows.other as o\ndef f():\n    o._LIMIT = 4",
        "def f():\n    from flows import other\n    return other._LIMIT",
        "if TYPE_CHECKING:\n    from flows.other import _LIMIT",
        "import importlib\nimportlib.import_module('flows._hidden')",
        "def f(x):\n    return x._made",
        "def f(x):\n    return x.y[0]()._kept",
        "class A:\n    def f(self):\n        return self.other._do()",
        "def f(x):\n    x._kept = 2",
        "def f(x):\n    _made = x._made",
        "def f():\n    from flows.other import Other\n    return Other._kept",
        "class A:\n    def f(self):\n        return [y._made for y in self.all if (z := y)]",
        "def f(x):\n    del x._made",
        "getattr(x, '_made')",
        "def f(x):\n    setattr(x, '_made', 1)",
        "def f(x):\n    hasattr(x, '_kept')",
        "monkeypatch.setattr('flows.other._LIMIT', 4)",
        # A name of this file's own does not make another file's object its own.
        "from flows.other import Other\nclass A:\n    _kept = 1\ndef f(x: Other):\n    return x._kept",
        "from flows.other import Other\nclass A:\n    _kept = 1\ndef f(x: 'Other | None' = None):\n    return x._kept",
        "import flows.other as o\nclass A:\n    _kept = 1\ndef f():\n    from flows.other import Other\n    x = Other()\n    x._kept",
        "from flows.other import Other\nclass A:\n    _kept = 1\n    def f(self):\n        with Other.open() as x:\n            return x._kept",
        "from flows.other import Other\nclass A:\n    def __init__(self, x: Other):\n        self.x = x\n        self._kept = 1\n    def f(self):\n        return self.x._kept",
        "from flows import other\n_LIMIT = other._LIMIT",
        "if TYPE_CHECKING:\n    from flows.other import Other\nclass A:\n    x: Other\n    _kept: int\n    def f(self): return self.x._kept",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["flows/this.py", "flows/__init__.py"])
def test_a_private_name_of_another_file_is_seen(path: str, text: str) -> None:
    ours, _ = private_uses(SourceTree({**OTHER, path: text}))
    assert len(ours) == 1 and ours[0].startswith(path)


@pytest.mark.parametrize(
    "text",
    [
        "from flows.other import Other\nfrom runtime_cpu import _core\nfrom runtime_cpu._core import EngineError\n_core.run()",
        "class A:\n    _kept: int = 1\n    def f(self, x: 'A'):\n        return x._kept + self._kept + cls._kept",
        "class A:\n    def __init__(self):\n        self._made = 1\n    def __eq__(self, other):\n        return other._made == self._made",
        "class A:\n    __slots__ = ('_kept',)\ndef f(x):\n    return x._kept",
        "A = namedtuple('A', 'x _kept')\nB = NamedTuple('B', [('_made', int)])\ndef f(x):\n    return x._kept + x._made",
        "class A:\n    def __init__(self):\n        object.__setattr__(self, '_made', 1)\ndef f(x):\n    return x._made",
        "from flows.other import Other\nclass B(Other):\n    def f(self):\n        return self._kept + super()._do() + type(self)._kept",
        "x.__class__, x.__dict__, x._replace(a=1), x._asdict(), os._exit(1), _, x._",
        "'x._made'\n# x._made",
        "def _made(): ...\nclass A:\n    f = _made\ngetattr(self, '_kept')",
    ],
)  # fmt: skip
def test_what_is_not_anothers_is_not_reported(text: str) -> None:
    assert private_uses(SourceTree({**OTHER, "flows/this.py": text})) == ([], [])


@pytest.mark.parametrize(
    "text",
    [
        "parameter._of_a_library",
        "import torch\ntorch._C._x",
        "from torch._dynamo import x",
        "import torch._a as t",
    ],
)
def test_a_private_name_of_a_library_is_seen(text: str) -> None:
    ours, libraries = private_uses(SourceTree({**OTHER, "flows/this.py": text}))
    assert ours == [] and len(unlisted(libraries)) == 1
