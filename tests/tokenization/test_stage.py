"""The tokenize stage on small texts: files of bounded size, the same tokens, and the bytes that readers need."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from components.artifacts import StageContext
from components.corpus.shards import TokenShards
from components.corpus.text_bytes import token_bytes
from components.tokenization import run

CONFIG = {"vocab_size": 300, "training_bytes": 100_000, "workers": 1}
DOCUMENTS = {"general": 11, "maths": 4, "code": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(3)
    # The tokenizer's normaliser makes the accent of its own and the angstrom sign shorter.
    words = ["".join(map(chr, random.integers(97, 123, size=6))) for _ in range(300)] + [
        "cafe\u0301",
        "\u212b",
    ]
    for split in ("train", "heldout"):
        for category, count in DOCUMENTS.items():
            path = folder / "curate" / split / f"{category}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as lines:
                for number in range(count):
                    text = " ".join([*random.choice(words, size=60), words[-1]])
                    lines.write(json.dumps({"id": f"{split}{number}", "text": text}) + "\n")
    (folder / "synthesize").mkdir()
    return {"curate": folder / "curate", "synthesize": folder / "synthesize"}


def tokenize(inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    out.mkdir()
    run(StageContext("tokenize", "test", CONFIG, inputs, out, out))
    index: dict[str, Any] = json.loads((out / "index.json").read_text())
    return index


def documents(out: Path, split: str, category: str) -> list[bytes]:
    shards = TokenShards.open(out)
    shards.check_ids()
    shard = shards.shard(split, category)
    ends = np.concatenate([np.zeros(1, np.int64), *shard.document_ends()]).tolist()
    return [shard.read(a, b - a).tobytes() for a, b in itertools.pairwise(ends)]


def test_a_file_holds_a_bounded_number_of_documents(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Document ends of a file are held in memory while it is written, so files may not grow with the corpus."""
    one = tokenize(inputs, tmp_path / "one")
    monkeypatch.setattr("components.tokenization.stage.FILE_DOCUMENTS", 4)
    many = tokenize(inputs, tmp_path / "many")
    for split in ("train", "heldout"):
        for category, count in DOCUMENTS.items():
            entry, cut = one["splits"][split][category], many["splits"][split][category]
            assert len(entry["files"]) == 1 and len(cut["files"]) == -(-count // 4)
            assert {**entry, "files": 0} == {**cut, "files": 0} and entry["documents"] == count
            whole, parts = (documents(tmp_path / name, split, category) for name in ("one", "many"))
            assert sorted(whole) == sorted(parts) and len(whole) == count
            if split == "heldout":
                assert whole == parts
        assert one["splits"][split]["sft"]["files"] == []
    assert not list((tmp_path / "many" / "shards" / "train").rglob("*unshuffled*"))


def test_the_index_says_what_held_out_tokens_stand_for(inputs: dict[str, Path], tmp_path: Path) -> None:
    index = tokenize(inputs, tmp_path / "out")
    lengths = token_bytes(Tokenizer.from_file(str(tmp_path / "out/tokenizer/tokenizer.json")), 300)
    for entry in index["splits"]["heldout"].values():
        tokens = [np.fromfile(tmp_path / "out" / name, "<u2") for name in entry["files"]]
        assert entry["token_bytes"] == sum(int(lengths[part].sum()) for part in tokens)
        if entry["files"]:
            assert 0 < entry["token_bytes"] < entry["bytes"]  # the normaliser made the text shorter
