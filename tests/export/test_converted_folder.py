"""The engine's converter and the export stage write the same files, key by key and byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from components.export.gguf_file import write_gguf
from components.export.vocabulary import read_vocabulary
from model import OfficialCheckpoint
from runtime_cpu.files.huggingface import HuggingFaceFolder
from tests.runtime_cpu import gguf_vocabulary
from tests.runtime_cpu.small_folders import VOCAB, write_folder, write_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "hf"


@pytest.mark.parametrize("name", ["tiny-4b", "tiny-21b", "toy"])
def test_a_converted_folder_is_the_exported_file(name: str, tmp_path: Path) -> None:
    source, vocabulary = GOLDEN / name, None
    if name == "toy":  # the golden vocabularies are too small for a tokenizer
        source = write_folder(tmp_path / "toy", shards=2)
        write_tokenizer(source, gguf_vocabulary.train(), chat_template="{{ messages }}")
        vocabulary = read_vocabulary(source, VOCAB)
    title = json.loads((source / "config.json").read_text())["model_name"]
    exported = {kind: tmp_path / f"exported-{kind}.gguf" for kind in ("f32", "f16", "q4_0")}
    write_gguf(OfficialCheckpoint(source), exported, title, vocabulary, output="q4_0")
    for kind, path in exported.items():
        mine = tmp_path / f"mine-{kind}.gguf"
        with HuggingFaceFolder(source) as folder:
            folder.write(mine, kind)
        left, right = GGUFReader(mine), GGUFReader(path)
        assert list(left.fields) == list(right.fields)
        for key in left.fields:
            assert left.fields[key].types == right.fields[key].types, key
            assert left.fields[key].contents() == right.fields[key].contents(), key
        for one, other in zip(left.tensors, right.tensors, strict=True):
            entries = [(entry.name, entry.tensor_type, list(entry.shape)) for entry in (one, other)]
            assert entries[0] == entries[1]
            assert np.array_equal(one.data, other.data), one.name
        assert mine.read_bytes() == path.read_bytes()
