"""The code in the README and the docs is run: Python as it stands, command lines up to their parsers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Document

from tests.docs.blocks import faults, is_run, language, open_page
from tests.docs.commands import PROJECT, commands
from tests.evaluation.tiny import save_tiny
from tests.runtime_cpu.servers import GOLDEN, running_server

# What was decided and measured names the commands of its day.
_HISTORY = ("docs/decisions/", "docs/experiments/", "CHANGELOG.md")
PAGES = [
    name
    for pattern in ("*.md", "docs/**/*.md", "docs/**/*.rst", "infra/**/*.md", "runtime_cpu/*.md")
    for path in sorted(PROJECT.glob(pattern))
    if not (name := path.relative_to(PROJECT).as_posix()).startswith(_HISTORY)
]
WITH_PYTHON = [name for name in PAGES if any(map(is_run, open_page(PROJECT / name)))]
# Blocks that say no-run. One more is a decision.
NOT_RUN = 0
_MENTIONED = re.compile(r"(?<!`)`((?:[\w./]*/)?python -m (?:flows|components|runtime_cpu)\b[^`\n]*)`")
_SERVER = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the blocks find what they name: a model file, a model's folder, and evaluation sets."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("MODEL.gguf", "model.gguf", "model-q4_0.gguf"):
        (folder / name).symlink_to(GOLDEN / "tiny-4b-q4_0.gguf")
    save_tiny(folder / "MODEL")
    evalsets = folder / "EVALSETS"
    evalsets.mkdir()
    row = {"id": "1", "question": "Which?", "choices": ["this", "that"], "answer": 0, "split": "dev"}
    (evalsets / "topic.jsonl").write_text(json.dumps(row) + "\n")
    (evalsets / "index.json").write_text(json.dumps({"topic": {"kind": "multiple_choice", "n": 1}}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of a server, for the pages that speak to one."""
    with running_server(folder / "MODEL.gguf", "--context", "256") as running:
        yield running.url


def run(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The page's Python blocks in a process of their own: a memory budget is a process's."""
    return subprocess.run(
        [sys.executable, "-m", "tests.docs.blocks", str(page)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def refused(entries: list[tuple[str, list[str], bool]]) -> list[str]:
    """Which of the commands (where, words, whether only mentioned) their programs refuse, and why."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.docs.commands"],
        input=json.dumps([(words, mentioned) for _, words, mentioned in entries]),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return [
        f"{where}: {' '.join(words)}: {answer}"
        for (where, words, _), answer in zip(entries, answers, strict=True)
        if answer
    ]


def called(name: str, page: Document) -> Iterator[tuple[str, list[str], bool]]:
    """The commands in a page's shell blocks, and those that its sentences name."""
    for block in page:
        if language(block) == "sh" and not block.region.lexemes["marker"]:
            for words in commands(block.parsed):
                yield f"{name}:{block.line}", words, False
    for found in _MENTIONED.finditer(page.text):
        line = page.text.count("\n", 0, found.start()) + 1
        for words in commands(found[1]):
            yield f"{name}:{line}", words, True


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_runs(name: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    page = PROJECT / name
    if _SERVER in page.read_text():
        text = page.read_text().replace(_SERVER, request.getfixturevalue("server"))
        page = tmp_path / page.name
        page.write_text(text)
    done = run(page, folder)
    assert done.returncode == 0, done.stderr


def test_commands_are_accepted_by_their_programs() -> None:
    entries = [entry for name in PAGES for entry in called(name, open_page(PROJECT / name))]
    assert entries
    assert refused(entries) == []


def test_every_block_says_what_it_is() -> None:
    assert [f"{name} {fault}" for name in PAGES for fault in faults(open_page(PROJECT / name))] == []


def test_blocks_that_are_not_run_are_counted() -> None:
    marked = [
        f"{name}:{block.line}: {block.region.lexemes['marker']}"
        for name in PAGES
        for block in open_page(PROJECT / name)
        if block.region.lexemes["marker"]
    ]
    assert len(marked) == NOT_RUN, marked


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```\nmake test\n```\n", "a block of ''"),
        ("```pyhton\n1\n```\n", "a block of 'pyhton'"),
        ("```python no-run\n1\n```\n", "the marker 'no-run'"),
        ("```python no-run: \n1\n```\n", "the marker 'no-run: '"),
        ("```python skip: slow\n1\n```\n", "the marker 'skip: slow'"),
        ("```text no-run: shown\n1\n```\n", "the marker"),
        ("~~~\n1\n~~~\n", "a block of ''"),
        ("- a list\n  ```\n  1\n  ```\n", "a block of ''"),
    ],
)
def test_an_unclear_block_is_found(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    (found,) = faults(open_page(tmp_path / "page.md"))
    assert fault in found


def test_a_block_that_fails_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "A page.\n\n```python\none = 1\n```\n\n```python no-run: shown\n1 / 0\n```\n\n```python\none / 0\n```\n"
    )
    done = run(page, tmp_path)
    assert done.returncode == 1
    assert f'File "{page}", line 12' in done.stderr and "ZeroDivisionError" in done.stderr


def test_blocks_of_restructured_text_are_run(tmp_path: Path) -> None:
    page = tmp_path / "page.rst"
    page.write_text(
        "Title\n=====\n\n.. code-block:: python\n\n   one = 1\n\nMore.\n\n.. code-block:: python\n\n   one / 0\n"
    )
    done = run(page, tmp_path)
    assert "ZeroDivisionError" in done.stderr


def test_commands_are_cut_as_a_shell_would() -> None:
    text = "A=1 make test  # all\nprintf '%s' a |\n    sudo install -m 600 x && python \\\n  -m b --c 'd e'\n\n# no\n"
    assert list(commands(text)) == [
        ["A=1", "make", "test"],
        ["printf", "%s", "a"],
        ["sudo", "install", "-m", "600", "x"],
        ["python", "-m", "b", "--c", "d e"],
    ]


def test_what_programs_refuse_is_found() -> None:
    engine = "runtime_cpu"  # apart, so that no check of mentions takes it for one
    lines = {
        "python -m runtime_cpu.logits MODEL.gguf TEXT OUT.npy": "",
        "python -m runtime_cpu.logits MODEL.gguf TEXT OUT.npy --thread 2": "",  # argparse completes options
        "python -m runtime_cpu.logits MODEL.gguf TEXT OUT.npy --speed 2": "unrecognized arguments",
        "python -m runtime_cpu.logits MODEL.gguf": "required",
        "python -m runtime_cpu.logits MODEL.gguf TEXT OUT.npy --threads N": "invalid int",
        f"python -m {engine}.nowhere": "nowhere",
        "python -m runtime_cpu.NAME --any": "",
        "python -m nowhere": "no module nowhere",
        "/opt/smallthinker/bin/smallthinker": "",
        "smallthinker logits MODEL.gguf TEXT OUT.npy --threads 2": "",
        "smallthinker logits MODEL.gguf TEXT OUT.npy --speed 2": "unrecognized arguments",
        "smallthinker fly": "no command",
        "python setup.py": "only python -m",
        "make lint ARGS=--any": "",
        "python -m components.pretraining.studies.benchmark --dry-run --layers 2": "",  # of a process that it starts
        "python -m components.pretraining.studies.benchmark --dry-run --speed 2": "unrecognized arguments",
        "make plan ARGS=--any": "unrecognized arguments",
        "make everything": "everything",
        "cmake -S . -B build -DSMALLTHINKER_TESTS=ON -DCMAKE_BUILD_TYPE=Release": "",
        "cmake -S . -B build -DSMALLTHINKER_TEST=ON": "no SMALLTHINKER_TEST",
        "cmake -S . -B build -DSMALLTHINKER_SPEED=ON": "no SMALLTHINKER_SPEED",
        "pytest tests/docs": "",
        "infra/setup/cross_tests.sh aarch64": "",
        "infra/setup/nowhere.sh": "no infra/setup/nowhere.sh",
        "pytest tests/nowhere": "no tests/nowhere",
        "sudo nowhere": "no program",
    }
    found = refused([(line, line.split(), False) for line in lines])
    for line, reason in lines.items():
        answers = [answer for answer in found if answer.startswith(f"{line}: ")]
        assert (len(answers) == 1 and reason in answers[0]) if reason else not answers, (line, found)


def test_a_mentioned_command_may_leave_out_what_is_required() -> None:
    lines = {"python -m runtime_cpu.logits": True, "python -m runtime_cpu.logits --speed 2": False}
    found = refused([(line, line.split(), True) for line in lines])
    assert len(found) == 1 and "--speed" in found[0]
