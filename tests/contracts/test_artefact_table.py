"""``docs/contracts.md`` has the pipeline's stages with their parents; its entries can be compared with files.

``tests/flows/test_pipeline.py`` compares them with what the smallest pipeline wrote.
"""

# ruff: noqa: E501 - a table's row takes one line

from __future__ import annotations

import pytest

from flows.stages import STAGES

from .artefact_table import Entry, Row, disagreements, read_table
from .source_tree import PROJECT

TABLE = """\
Text
| stage (`components/…`) | parents (role: stage) | writes |
| --- | --- | --- |
| `first` (`first/`) | – | `<task>.jsonl` per set, `index.json` |
| `second` (`second/sets.py`) | first, chat: other | `a/ b/` (folders, as `c` says), `gguf/<recipe>-{f16,q4_0}.gguf`, `x.json` (when `ask` is set) |

| `no` (`row/`) | – | `of.it` |
"""


def test_the_table_has_the_pipelines_stages_and_parents() -> None:
    table = read_table((PROJECT / "docs/contracts.md").read_text())
    assert {name: dict(row.parents) for name, row in table.items()} == {
        stage.name: dict(stage.parents) for stage in STAGES
    }
    for stage in STAGES:
        folder = f"components/{table[stage.name].component}"
        assert (PROJECT / folder).exists()
        assert f"{stage.module.replace('.', '/')}/".startswith(folder.removesuffix(".py").rstrip("/") + "/")
        assert table[stage.name].writes


def test_a_table_is_read() -> None:
    assert read_table(TABLE) == {
        "first": Row("first/", {}, (Entry("<task>.jsonl"), Entry("index.json"))),
        "second": Row(
            "second/sets.py",
            {"first": "first", "chat": "other"},
            (
                Entry("a/"),
                Entry("b/"),
                Entry("gguf/<recipe>-{f16,q4_0}.gguf"),
                Entry("x.json", optional=True),
            ),
        ),
    }


@pytest.mark.parametrize(
    "text", ["", "| a | b |", TABLE.replace("`first` (`first/`)", "first"), TABLE.replace("| – |", "|")]
)
def test_what_is_no_such_table_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"no table|not a row"):
        read_table(text)


@pytest.mark.parametrize(
    ("entries", "files", "found"),
    [
        ("index.json", ["index.json"], []),
        ("index.json", [], ["index.json is not written"]),
        ("index.json", ["index.json", "x.json"], ["x.json is in no entry"]),
        ("index.json", ["a/index.json"], ["a/index.json is in no entry", "index.json is not written"]),
        ("indexXjson", ["index.json"], ["index.json is in no entry", "indexXjson is not written"]),
        ("<task>.jsonl", ["mmlu.jsonl", "gsm.jsonl"], []),
        ("<task>.jsonl", ["a/mmlu.jsonl"], ["a/mmlu.jsonl is in no entry", "<task>.jsonl is not written"]),
        ("shards/<split>/<category>/", ["shards/train/code/0.ds", "shards/train/code/x/y"], []),
        ("shards/<split>/<category>/", ["shards/train/0.ds"], ["shards/train/0.ds is in no entry", "shards/<split>/<category>/ is not written"]),
        ("hf/", ["hf/config.json", "hf/x/y"], []),
        ("hf/", ["hf"], ["hf is in no entry", "hf/ is not written"]),
        ("hf/", ["hfx/y"], ["hfx/y is in no entry", "hf/ is not written"]),
        ("<r>-{f16,f32}.gguf", ["nano-f16.gguf", "nano-f32.gguf"], []),
        ("<r>-{f16,f32}.gguf", ["nano-f16.gguf"], ["<r>-f32.gguf is not written"]),
    ],
)  # fmt: skip
def test_files_and_entries_are_compared(entries: str, files: list[str], found: list[str]) -> None:
    assert disagreements([Entry(name) for name in entries.split()], files) == found


def test_an_optional_entry_may_be_missing_and_covers_its_file() -> None:
    optional = [Entry("x.json", optional=True)]
    assert disagreements(optional, []) == [] and disagreements(optional, ["x.json"]) == []
