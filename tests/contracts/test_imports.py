"""Arrows between the rooms point one way, and so do those inside ``components`` and ``runtime_cpu``.

docs/contracts.md: flows -> components -> model; runtime_cpu stands alone; infra holds no code of ours to import.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from .source_tree import Module, SourceTree, expect_nothing

ROOMS = ("flows", "components", "model", "runtime_cpu", "infra", "tests")
MAY_IMPORT: dict[str, set[str]] = {
    "flows": {"flows", "components", "model"},
    "components": {"components", "model"},
    "model": {"model"},
    "runtime_cpu": {"runtime_cpu"},
    "infra": {"infra"},
}
# An edge box has none of these.
NOT_ON_AN_EDGE_BOX = {
    "torch", "transformers", "deepspeed", "prefect", "mlflow", "datatrove", "lm_eval", "accelerate", "datasets",
}  # fmt: skip
# Imported when a command's option asks for it, with a sentence of its own where it is missing.
ON_REQUEST = {("runtime_cpu.bench", "mlflow")}

# Each folder of components is one of three. What two stages need belongs to the ground.
STAGES = {
    "curation", "synthesis", "tokenization", "pretraining", "posttraining", "merging", "evaluation", "export",
    "devices",
}  # fmt: skip
GROUND = {"artifacts", "sources", "corpus", "measures", "weights"}
OBSERVERS = {"tracking", "reporting"}

# Who starts the processes of pretraining and runs the stage: on top of its sub-packages, never below one.
ENTRIES_OF_PRETRAINING = {"stage", "worker", "launcher"}
# Experiments with commands of their own. Nothing of the product rests on them.
STUDIES = ("components.pretraining.studies", "components.export.head_study")

# The engine's rooms: what a program may load, and what is run. The second kind builds on the first.
ENGINE_LIBRARY = {"engine", "text", "files", "memory"}
ENGINE_COMMANDS = {"commands", "serve", "bench", "pack", "synth"}
# What lies above the rooms: both kinds need the last two, and only the list of commands needs no command's room.
ENGINE_TOP = {"__init__", "__main__", "_core", "closing", "console"}
LIST_OF_COMMANDS = "runtime_cpu.commands.table."


def _top(name: str) -> str:
    return name.partition(".")[0]


def _asked_for(module: Module) -> set[str]:
    return {package for room, package in ON_REQUEST if module.name.startswith(room)}


def room_violations(module: Module) -> list[str]:
    """Imports of a module that its room does not allow."""
    room = _top(module.name)
    found = []
    for imported in module.imports:
        top = _top(imported.module)
        where = f"{module.path}:{imported.line}"
        if top in ROOMS and top not in MAY_IMPORT[room]:
            found.append(f"{where}: {room} may not import {imported.dotted}")
        elif room == "runtime_cpu" and top in NOT_ON_AN_EDGE_BOX - _asked_for(module):
            found.append(f"{where}: the engine runs without {top}")
    return found


def component_violations(module: Module) -> list[str]:
    """A stage imports no other stage; the ground no stage and no observer; observers the ground only."""
    parts = module.name.split(".")
    if parts[0] != "components" or len(parts) < 2:
        return []
    here = parts[1]
    forbidden = {
        **dict.fromkeys(STAGES, (STAGES - {here}) | OBSERVERS),
        **dict.fromkeys(GROUND, STAGES | OBSERVERS),
        **dict.fromkeys(OBSERVERS, STAGES | (OBSERVERS - {here})),
    }.get(here, set())
    kind = "a stage" if here in STAGES else "shared ground" if here in GROUND else "an observer"
    return [
        f"{module.path}:{imported.line}: {here} is {kind} and may not import {imported.dotted}"
        for imported in module.imports
        if (names := imported.dotted.split("."))[0] == "components"
        and len(names) > 1
        and names[1] in forbidden
    ]


def folders_without_a_kind(tree: SourceTree) -> list[str]:
    """Folders of components that are neither stage nor ground nor observer, and modules outside any folder."""
    folders = {path.split("/")[1] for path in tree.files if path.startswith("components/")}
    return sorted(folders - STAGES - GROUND - OBSERVERS - {"__init__.py"})


def _is_study(dotted: str) -> bool:
    return any(f"{dotted}.".startswith(f"{study}.") for study in STUDIES)


def pretraining_violations(tree: SourceTree) -> list[str]:
    """Studies are imported by no product module; sub-packages import none of the modules that start a run."""
    found = []
    for name, module in tree.modules.items():
        within = _is_study(name)
        parts = module.path.split("/")
        nested = module.path.startswith("components/pretraining/") and len(parts) > 3 and not within
        for imported in module.imports:
            dotted = f"{imported.dotted}."
            where = f"{module.path}:{imported.line}"
            if _is_study(imported.dotted) and not within:
                found.append(f"{where}: a study is no part of the product: {imported.dotted}")
            target = dotted.removeprefix("components.pretraining.").split(".")[0]
            if nested and dotted.startswith("components.pretraining.") and target in ENTRIES_OF_PRETRAINING:
                found.append(f"{where}: {parts[2]}/ lies below {target}, which starts the run")
    return found


def engine_violations(tree: SourceTree) -> list[str]:
    """Every module of the engine lies in a room; no library room imports a command's room."""
    found = []
    for name, module in tree.modules.items():
        if _top(name) != "runtime_cpu":
            continue
        parts = module.path.removeprefix("runtime_cpu/").split("/")
        room = parts[0] if len(parts) > 1 else parts[0].partition(".")[0]
        library = room in ENGINE_LIBRARY or (len(parts) == 1 and room != "__main__")
        if len(parts) == 1 and room not in ENGINE_TOP:
            found.append(f"{module.path}: in no room of the engine")
        elif len(parts) > 1 and room not in ENGINE_LIBRARY | ENGINE_COMMANDS | {"csrc"}:
            found.append(f"{module.path}: {room}/ is neither a library room nor a command's")
        for imported in module.imports if library else ():
            names = imported.dotted.split(".")
            listed = name == "runtime_cpu" and f"{imported.dotted}.".startswith(LIST_OF_COMMANDS)
            if names[0] == "runtime_cpu" and len(names) > 1 and names[1] in ENGINE_COMMANDS and not listed:
                found.append(
                    f"{module.path}:{imported.line}: a library imports a command's {imported.dotted}"
                )
    return found


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows_point_one_way(room: str) -> None:
    modules = SourceTree.committed(room).modules.values()
    expect_nothing(line for module in modules for line in room_violations(module))


def test_a_stage_stands_on_the_ground_and_on_no_other_stage() -> None:
    modules = SourceTree.committed("components").modules.values()
    expect_nothing(line for module in modules for line in component_violations(module))


def test_every_folder_of_components_is_a_stage_or_ground_or_an_observer() -> None:
    expect_nothing(folders_without_a_kind(SourceTree.committed("components")))


def test_studies_and_entries_of_pretraining_are_imported_by_nothing_below() -> None:
    tree = SourceTree.committed("flows", "components", "model", "runtime_cpu")
    expect_nothing(pretraining_violations(tree))
    # Without the folders and modules of these names the rules above would hold of anything.
    entries = {f"components.pretraining.{entry}" for entry in ENTRIES_OF_PRETRAINING}
    assert {*STUDIES, *entries} <= set(tree.modules)


def test_the_engines_libraries_import_no_command() -> None:
    tree = SourceTree.committed("runtime_cpu")
    expect_nothing(engine_violations(tree))
    assert {path.split("/")[1] for path in tree.files} >= ENGINE_LIBRARY | ENGINE_COMMANDS


def all_violations(path: str, text: str) -> list[str]:
    module, tree = Module(path, text), SourceTree({path: text})
    found = room_violations(module) + component_violations(module)
    return found + pretraining_violations(tree) + engine_violations(tree)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("model/a.py", "import components.artifacts"),
        ("model/a.py", "def f():\n    from flows import runner"),
        ("model/__init__.py", "from components import artifacts as a"),
        ("model/a.py", "import importlib\nclass C:\n    x = importlib.import_module('components.artifacts')"),
        ("components/artifacts/a.py", "from flows.recipes import nano"),
        ("components/artifacts/a.py", "import runtime_cpu"),
        ("components/artifacts/a.py", "import importlib\nimportlib.import_module('flows.runner')"),
        (
            "components/artifacts/a.py",
            "from importlib import import_module\nimport_module(f'runtime_cpu.{name}')",
        ),
        ("components/export/a.py", "from runtime_cpu import Engine"),
        ("runtime_cpu/engine/a.py", "import torch.nn as nn"),
        ("runtime_cpu/engine/a.py", "from torch import nn"),
        ("runtime_cpu/bench/a.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("runtime_cpu/engine/a.py", "import mlflow"),
        ("runtime_cpu/engine/a.py", "from model import preset"),
        ("runtime_cpu/engine/a.py", "from tests import x"),
        ("infra/a.py", "from components import artifacts"),
        # Inside components.
        ("components/merging/stage.py", "from components.pretraining.engine import choose_device"),
        ("components/merging/stage.py", "from components import pretraining"),
        ("components/merging/stage.py", "from components import pretraining as p"),
        ("components/merging/stage.py", "import components.pretraining"),
        ("components/merging/stage.py", "from ..pretraining import plan"),
        ("components/merging/stage.py", "from .. import pretraining"),
        ("components/merging/__init__.py", "from ..pretraining import plan"),
        ("components/synthesis/teacher/client.py", "from ...curation import policies"),
        ("components/merging/stage.py", "from components.tracking import registry"),
        ("components/merging/stage.py", "def f():\n    import components.evaluation.scoring as s"),
        ("components/measures/heldout.py", "from components.evaluation import scoring"),
        (
            "components/measures/heldout.py",
            "if TYPE_CHECKING:\n    from components.pretraining import config",
        ),
        ("components/artifacts/store.py", "from components.reporting import page"),
        ("components/reporting/page.py", "from components.curation import funnel"),
        ("components/reporting/page.py", "from components import tracking"),
        # Pretraining.
        ("components/pretraining/training/trainer.py", "from components.pretraining.studies.replay import x"),
        ("components/pretraining/stage.py", "from components.pretraining import studies"),
        ("components/pretraining/stage.py", "from .studies import replay"),
        ("components/export/head_predictor.py", "from components.export.head_study import TILE_ROWS"),
        ("flows/pretrain.py", "def f():\n    import components.pretraining.studies.benchmark as b"),
        ("components/pretraining/data/batches.py", "from components.pretraining import stage"),
        ("components/pretraining/data/batches.py", "from ..worker import request"),
        ("components/pretraining/data/__init__.py", "from .. import launcher"),
        # The engine.
        ("runtime_cpu/engine/engine.py", "from runtime_cpu.commands.chat import main"),
        ("runtime_cpu/engine/engine.py", "from ..serve import app"),
        ("runtime_cpu/files/reader.py", "from runtime_cpu import pack"),
        ("runtime_cpu/__init__.py", "from .bench import run"),
        ("runtime_cpu/text/tokenizer.py", "import importlib\nimportlib.import_module('runtime_cpu.synth')"),
        ("runtime_cpu/engine/engine.py", "from runtime_cpu.commands.table import COMMANDS"),
        ("runtime_cpu/closing.py", "from runtime_cpu.serve import app"),
        ("runtime_cpu/engine.py", ""),
        ("runtime_cpu/others/a.py", ""),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, text: str) -> None:
    assert len(all_violations(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("components/export/a.py", "import torch\nfrom model import preset\nfrom . import b"),
        (
            "runtime_cpu/engine/a.py",
            "import numpy\nfrom .b import c\nfrom runtime_cpu import d\nimport torchlight",
        ),
        ("runtime_cpu/bench/report.py", "def f():\n    import mlflow"),
        ("runtime_cpu/_core.pyi", "import numpy"),
        ("components/merging/stage.py", "from components.measures import intervals\nfrom .. import weights"),
        ("components/merging/stage.py", "from . import linear\nfrom components.merging import pretraining"),
        (
            "components/merging/stage.py",
            "from .pretraining import plan\nfrom components.merging.export import x",
        ),
        (
            "components/measures/heldout.py",
            "from components.corpus import shards\nfrom model import accounting",
        ),
        (
            "components/tracking/registry.py",
            "from components.artifacts import Manifest\nfrom . import mlflow_tracker",
        ),
        (
            "components/pretraining/stage.py",
            "from components.pretraining import launcher\nfrom .data import batches",
        ),
        ("components/pretraining/studies/replay.py", "from . import benchmark\nfrom ..stage import run"),
        (
            "components/pretraining/data/batches.py",
            "from ..config import PretrainConfig\nfrom .worker import x",
        ),
        ("runtime_cpu/commands/chat.py", "from runtime_cpu.serve import answer\nfrom ..engine import engine"),
        (
            "runtime_cpu/__init__.py",
            "from runtime_cpu.commands.table import Finder\nfrom .engine.engine import Engine",
        ),
        ("runtime_cpu/__main__.py", "from runtime_cpu.commands import table"),
    ],
)
def test_a_right_arrow_is_not_reported(path: str, text: str) -> None:
    assert all_violations(path, text) == []


def test_a_folder_without_a_kind_is_seen() -> None:
    files: Mapping[str, str] = dict.fromkeys(
        ("components/__init__.py", "components/merging/a.py", "components/helpers/a.py", "components/x.py"),
        "",
    )
    assert folders_without_a_kind(SourceTree(files)) == ["helpers", "x.py"]
