"""Files, modules and commands that documents and comments name are there, and links lead somewhere."""

from __future__ import annotations

import posixpath
from functools import lru_cache

import pytest

from .mentions import OF_OTHERS, Repository, broken_links, unknown_commands, unknown_modules, unknown_paths
from .source_tree import committed, expect_nothing, relative

TEXTS = (
    ".md",
    ".py",
    ".pyi",
    ".cpp",
    ".hpp",
    ".h",
    ".sh",
    ".toml",
    ".yaml",
    ".sbatch",
    ".service",
    ".in",
    ".txt",
    ".j2",
    ".html",
)
NAMED = ("Makefile", "CMakeLists.txt", "LICENSE")
# Its sources hold made-up names, to be seen and not to be seen.
OWN_EXAMPLES = "tests/contracts/"


@lru_cache
def repository() -> Repository:
    texts = {}
    for path in committed():
        name = relative(path)
        readable = name.endswith(TEXTS) or posixpath.basename(name) in NAMED
        texts[name] = path.read_text() if readable else ""
    return Repository(texts)


def speaking() -> list[str]:
    """Files whose texts and comments people read."""
    return [path for path, text in repository().files.items() if text and not path.startswith(OWN_EXAMPLES)]


def test_files_that_are_named_are_there() -> None:
    expect_nothing(line for path in speaking() for line in unknown_paths(repository(), path))


def test_modules_that_are_named_are_there() -> None:
    expect_nothing(line for path in speaking() for line in unknown_modules(repository(), path))


def test_commands_that_are_named_run() -> None:
    expect_nothing(line for path in speaking() for line in unknown_commands(repository(), path))


def test_links_lead_somewhere() -> None:
    documents = [path for path in repository().files if path.endswith(".md")]
    expect_nothing(line for path in documents for line in broken_links(repository(), path))


def test_files_of_others_are_named_and_are_not_ours() -> None:
    said = "\n".join(repository().files[path] for path in speaking())
    assert [name for name in OF_OTHERS if name not in said or name in repository().base_names] == []


FILES = {
    "README.md": "# Small\n## Two `commands`, here\n",
    "docs/engine.md": "# The engine\n\n## Memory (RAM)\n## Twice\n## Twice\n```\n# No heading\n```\n<a id='hand'></a>",
    "docs/pipeline.svg": "",
    "flows/__init__.py": "",
    "flows/pipeline.py": "class Run:\n    def start(self):\n        self.begun = True\ndef main(): ...\n",
    "components/__init__.py": "",
    "components/evaluation/__init__.py": "from components.evaluation.sets import write_sets\n",
    "components/evaluation/sets.py": "def write_sets(): ...\n",
    "model/__init__.py": "",
    "model/accounting.py": "def count(): ...\n",
    "runtime_cpu/__init__.py": "",
    "runtime_cpu/csrc/cache.hpp": "",
    "runtime_cpu/csrc/tools/replay_routes.cpp": "",
    "runtime_cpu/serve/__init__.py": "",
    "runtime_cpu/serve/__main__.py": "",
    "tests/__init__.py": "",
}


def found(path: str, text: str) -> list[str]:
    made = Repository({**FILES, path: text})
    asked = [unknown_paths, unknown_modules, unknown_commands]
    return [
        line
        for ask in [*asked, *([broken_links] if path.endswith(".md") else [])]
        for line in ask(made, path)
    ]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("docs/a.md", "see flows/runner.py"),
        ("docs/a.md", "see `runner.py`."),
        ("docs/a.md", "see (runner.py), where"),
        ("docs/a.md", "```\nflows/runner.py\n```"),
        ("docs/a.md", "flows/{pipeline,runner}.py"),
        ("docs/a.md", "flows/run*.py"),
        ("docs/a.md", "docs/picture.png"),
        ("docs/a.md", "in `components/curation/`"),
        ("docs/a.md", "in components/curation."),
        ("docs/a.md", "`components.curation`"),
        ("docs/a.md", "flows.pipeline.stop"),
        ("docs/a.md", "flows.pipeline.Run.stop()"),
        ("docs/a.md", "flows.pipeline:stop"),
        ("docs/a.md", "model.accounting.flops"),
        ("docs/a.md", "python -m flows.runner --plain"),
        ("docs/a.md", ".venv/bin/python -m components.evaluation x"),
        ("docs/a.md", "python3 -u -m runtime_cpu.nothing"),
        ("Makefile", "run:\n\t$(PY) -m flows.runner"),
        ("flows/a.py", "run([sys.executable, '-m', 'flows.runner'])"),
        ("flows/a.py", "say('call python -m flows.runner')"),
        ("flows/a.py", '"""Like runner.py."""'),
        ("flows/a.py", "class A:\n    x: int\n    '''Of flows/runner.py.'''"),
        ("flows/a.py", "x = 1  # as in cache_policy.hpp"),
        ("flows/a.pyi", "# flows.runner.Runner"),
        ("runtime_cpu/csrc/a.cpp", "int x; // see tests/replay.cpp"),
        ("runtime_cpu/csrc/a.hpp", "/* Of\n * gone.hpp */"),
        ("infra/a.sh", "# infra/setup/gone.sh"),
        ("infra/a.yaml", "file: infra/gone.yaml"),
        ("CMakeLists.txt", "# in runtime_cpu/csrc/gone"),
        ("docs/a.md", "[here](gone.svg)"),
        ("docs/a.md", "[here](../docs)\n[there](gone/)"),
        ("docs/a.md", "![A picture](pictures/a.jpg 'title')"),
        ("docs/a.md", "[here](engine.md#cpu)"),
        ("docs/a.md", "[here](#nothing)"),
        ("docs/a.md", "[here](engine.md#no-heading)"),
        ("docs/a.md", "[here](engine.md#twice-2)"),
        ("docs/a.md", "[x]\n\n[x]: gone.txt"),
        ("docs/a.md", "<img src='gone.jpg'>"),
    ],
)
def test_what_stands_for_nothing_is_seen(path: str, text: str) -> None:
    assert len(found(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "docs/a.md",
            "flows/pipeline.py, pipeline.py; `sets.py`: evaluation/sets.py (components/evaluation/)",
        ),
        (
            "docs/a.md",
            "flows/{pipeline,__init__}.py and flows/pipe*.py and docs/*.svg and every *.py or .cpp",
        ),
        ("docs/a.md", "tools/replay_routes.cpp and csrc/cache.hpp and cache.hpp and docs/engine.md"),
        (
            "docs/a.md",
            "runs/nano/x.md, FOLDER/x.py, <stage>/config.py, {host}.toml, MODEL.md, NNNN-x.md, $HOME/a.sh, /etc/b.toml",
        ),
        (
            "docs/a.md",
            "https://example.org/flows/x.py and manifest.json, metrics.jsonl, loss.png, report.html",
        ),
        ("docs/a.md", "flows/components/model point one way; components/<room>/ and components/*/"),
        (
            "docs/a.md",
            "`flows.pipeline`, flows.pipeline.main, flows.pipeline.Run.begun, flows.pipeline:main.",
        ),
        (
            "docs/a.md",
            "components.evaluation.write_sets, model.accounting.count, model.safetensors, model.generate()",
        ),
        ("docs/a.md", "runtime_cpu.NAME, python -m runtime_cpu.NAME, my.flows.x, flows.pipeline. Flows"),
        ("docs/a.md", "python -m flows.pipeline, python -m runtime_cpu.serve, python -m runtime_cpu.inspect"),
        (
            "docs/a.md",
            "python -m pip, python -m pytest -m pipeline tests/flows, python -m runtime_cpu.<name>",
        ),
        ("flows/a.py", "x = 'flows/runner.py'\ny = f'python -m runtime_cpu.{name}'\nimport flows.runner"),
        (
            "runtime_cpu/csrc/a.cpp",
            '#include "gone.hpp"\nauto x = "// gone.hpp"; char c = \'"\'; // cache.hpp',
        ),
        ("docs/a.md", "[a](engine.md#memory-ram) [b](../README.md#two-commands-here) [c](#d)\n# D"),
        (
            "docs/a.md",
            "[a](engine.md#twice-1) [b](engine.md#hand) [c](https://x.org/y) ![d](pipeline.svg)",
        ),
        ("docs/a.md", "`[a](gone.txt)` and `f(x)[1](z.txt)`\n```\n[a](gone.txt)\n```\n[d](./engine.md)"),
    ],
)
def test_what_is_there_is_not_reported(path: str, text: str) -> None:
    assert found(path, text) == []
