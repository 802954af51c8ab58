"""What several stages need is defined once: two intervals or two orders of the categories would drift apart.

The engine stands alone and shares no code with the rest, so a thing may be there once more.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from .source_tree import PRODUCT, Module, SourceTree, dotted, expect_nothing
from .test_imports import GROUND

CATEGORIES = ("general", "maths", "code", "web_stem", "chinese")
TOKENIZER_FOLDER = "tokenizer"
JOINS = ("Path", "joinpath", "join")


def _full_names(module: Module) -> dict[str, str]:
    """What the file calls an imported name: ``sync`` is ``os.fsync`` after ``from os import fsync as sync``."""
    return {
        alias.asname: alias.name
        for node in module.nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }


def calls(*names: str) -> Callable[[Module], Iterator[int]]:
    def places(module: Module) -> Iterator[int]:
        full = _full_names(module)
        for node in module.nodes:
            if isinstance(node, ast.Call):
                last = node.func.attr if isinstance(node.func, ast.Attribute) else dotted(node.func)
                if full.get(last, last) in names:
                    yield node.lineno

    return places


def defines(*beginnings: str) -> Callable[[Module], Iterator[int]]:
    def places(module: Module) -> Iterator[int]:
        for node in module.nodes:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name.lstrip("_").startswith(beginnings):
                yield node.lineno

    return places


def assigns(*names: str) -> Callable[[Module], Iterator[int]]:
    """Where a module binds a name to a value of its own, not to an imported name under another."""

    def places(module: Module) -> Iterator[int]:
        for node in module.nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name) and part.id.lstrip("_") in names:
                            yield node.lineno

    return places


def lists_categories(module: Module) -> Iterator[int]:
    """The categories' names spelled in a row, whatever they are called."""
    for node in module.nodes:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            texts = [part.value for part in node.elts if isinstance(part, ast.Constant)]
            if set(CATEGORIES) <= set(texts):
                yield node.lineno


def names_tokenizer_folder(module: Module) -> Iterator[int]:
    """``folder / "tokenizer"`` and ``Path(folder, "tokenizer", …)``."""
    for node in module.nodes:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in JOINS:
            parts = list(node.args)
        else:
            continue
        texts = [part.value for part in parts if isinstance(part, ast.Constant)]
        if any(isinstance(text, str) and text.split("/")[0] == TOKENIZER_FOLDER for text in texts):
            yield node.lineno


SHARED_GROUND = tuple(f"components/{room}/" for room in sorted(GROUND))
THE_ENGINE = "runtime_cpu/"


@dataclass(frozen=True)
class Single:
    """A thing that one file may have, below ``home`` (none where that is empty); and one of the engine.

    Attributes:
        also: further files that may have it, each with the reason.
    """

    name: str
    places: Callable[[Module], Iterator[int]]
    home: tuple[str, ...] = SHARED_GROUND
    also: Mapping[str, str] = field(default_factory=dict)


THINGS = (
    Single("durable writes (fsync)", calls("fsync", "fdatasync")),
    Single("figures (savefig)", calls("savefig")),
    Single("Wilson's interval", defines("wilson")),
    Single("the choice of a device", defines("choose_device")),
    Single("the categories' order", assigns("CATEGORIES")),
    Single("the categories in a row", lists_categories),
    Single("the tokenizer folder's name", assigns("TOKENIZER_FOLDER")),
    Single("a path to the tokenizer folder", names_tokenizer_folder, home=()),
    Single("the exit code of a user's error", assigns("EXIT_USER_ERROR")),
    Single(
        "the counter of parameters and FLOPs",
        defines("count_parameters", "count_expert_parameters", "parameter_count", "training_fl"),
        home=("model/accounting.py",),
    ),
)


def second_definitions(thing: Single, tree: SourceTree) -> list[str]:
    """Places of a thing in more than one file, or in a file that is not its home."""
    ours: dict[str, list[int]] = {}
    engines: dict[str, list[int]] = {}
    for module in tree.modules.values():
        lines = sorted(set(thing.places(module)))
        if lines and module.path not in thing.also:
            (engines if module.path.startswith(THE_ENGINE) else ours)[module.path] = lines
    wrong = [
        *(ours if len(ours) > 1 or not all(path.startswith(thing.home) for path in ours) else ()),
        *(engines if len(engines) > 1 else ()),
    ]
    return [f"{path}:{line}: {thing.name}" for path in wrong for line in {**ours, **engines}[path]]


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.name)
def test_what_stages_share_is_defined_once(thing: Single) -> None:
    tree = SourceTree.committed(*PRODUCT)
    expect_nothing(second_definitions(thing, tree))
    # Under another name it would be found nowhere, and the rule would hold of anything.
    assert not thing.home or any(True for module in tree.modules.values() for _ in thing.places(module))
    assert set(thing.also) <= set(tree.files)


def places(name: str, text: str) -> list[int]:
    thing = next(thing for thing in THINGS if thing.name == name)
    return list(thing.places(Module("components/merging/a.py", text)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("durable writes (fsync)", "import os\nos.fsync(1)"),
        ("durable writes (fsync)", "from os import fsync\ndef f():\n    fsync(1)"),
        ("durable writes (fsync)", "from os import fsync as sync\nsync(1)"),
        ("durable writes (fsync)", "os.fdatasync(handle.fileno())"),
        ("figures (savefig)", "figure.savefig(path, dpi=110)"),
        ("figures (savefig)", "import matplotlib.pyplot as plt\nplt.gcf().savefig(path)"),
        ("Wilson's interval", "def wilson(hits, trials): ..."),
        ("Wilson's interval", "class A:\n    def _wilson_interval(self): ..."),
        ("the choice of a device", "async def choose_device(): ..."),
        ("the categories' order", "CATEGORIES: tuple[str, ...] = ('a',)"),
        ("the categories' order", "_CATEGORIES, X = ('a',), 1"),
        ("the categories in a row", "NAMES = ['general', 'maths', 'code', 'web_stem', 'chinese', 'sft']"),
        ("the categories in a row", "C = Literal['general', 'maths', 'code', 'web_stem', 'chinese']"),
        ("the tokenizer folder's name", "TOKENIZER_FOLDER = 'tokenizer'"),
        ("a path to the tokenizer folder", "x = folder / 'tokenizer' / 'tokenizer.json'"),
        ("a path to the tokenizer folder", "x = folder / 'tokenizer/tokenizer.json'"),
        ("a path to the tokenizer folder", "x = os.path.join(folder, 'tokenizer')"),
        ("a path to the tokenizer folder", "x = folder.joinpath('tokenizer')"),
        ("the exit code of a user's error", "if x:\n    EXIT_USER_ERROR = 2"),
        ("the counter of parameters and FLOPs", "def training_flops_per_token(config, context): ..."),
    ],
)
def test_a_definition_is_seen(name: str, text: str) -> None:
    assert len(places(name, text)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("durable writes (fsync)", "'os.fsync(1)'\n# os.fsync(1)\nsync(path)\nfrom os import fsync"),
        ("figures (savefig)", "from components.measures.figures import save\nsave(figure, path)"),
        ("Wilson's interval", "from components.measures.intervals import wilson\nwilson(1, 2)"),
        (
            "the categories' order",
            "from components.corpus import CATEGORIES\nfor x in CATEGORIES: y = CATEGORIES",
        ),
        ("the categories in a row", "['general', 'code']\n{'general': 1, 'maths': 2}"),
        ("a path to the tokenizer folder", "folder / 'tokenizer.json'\nPath('my tokenizer')\nf('tokenizer')"),
        ("the exit code of a user's error", "sys.exit(EXIT_USER_ERROR)\nEXIT_OTHER = 2"),
    ],
)
def test_a_use_is_no_definition(name: str, text: str) -> None:
    assert places(name, text) == []


@pytest.mark.parametrize(
    ("paths", "wrong"),
    [
        (["components/artifacts/files.py"], 0),
        (["components/artifacts/files.py", "runtime_cpu/files/gguf_writer.py"], 0),
        (["components/merging/stage.py"], 1),
        (["components/artifacts/files.py", "components/measures/files.py"], 2),
        (["components/artifacts/files.py", "components/merging/stage.py"], 2),
        (["runtime_cpu/files/a.py", "runtime_cpu/files/b.py"], 2),
        (["flows/runner.py"], 1),
        (["components/artifacts/files.py", "components/pretraining/measured.py"], 0),
    ],
)
def test_one_file_of_the_ground_and_one_of_the_engine_may_have_a_thing(paths: list[str], wrong: int) -> None:
    thing = Single("fsync", calls("fsync"), also={"components/pretraining/measured.py": "measured"})
    assert len(second_definitions(thing, SourceTree(dict.fromkeys(paths, "os.fsync(1)")))) == wrong
