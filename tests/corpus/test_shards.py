"""Token shards: real ``.ds`` files are read back exactly, torn ones are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from hypothesis import given
from hypothesis import strategies as st

from components.corpus.shards import ShardError, TokenShards

EOS = 60


def write_shards(folder: Path, files: list[list[list[int]]], dtype: str = "uint16") -> Path:
    """Write documents with datatrove's own writer, as the stage does."""
    names, tokens, documents = [], 0, 0
    for number, file in enumerate(files):
        name = f"shards/train/general/{number:05d}.ds"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        out = TokenizedFile(str(folder), name, token_size=2 if dtype == "uint16" else 4)
        for document in file:
            out.write([*document, EOS], None)
            tokens += len(document) + 1
        documents += len(file)
        out.close()
        names.append(name)
    entry = {"tokens": tokens, "documents": documents, "bytes": 7, "files": names}
    empty = {"tokens": 0, "documents": 0, "bytes": 0, "files": []}
    splits = {"train": {"general": entry, "maths": empty}, "heldout": {}}
    index = {"dtype": dtype, "vocab_size": 64, "eos_id": EOS, "splits": splits}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


FILES = [[[1, 2, 3], [4]], [[5, 6]], [[7], [8, 9], []]]
JOINED = [document for file in FILES for document in file]
FLAT = [1, 2, 3, EOS, 4, EOS, 5, 6, EOS, 7, EOS, 8, 9, EOS, EOS]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reads_across_files(tmp_path: Path, dtype: str) -> None:
    shards = TokenShards.open(write_shards(tmp_path, FILES, dtype))
    shard = shards.shard("train", "general")
    assert len(shard) == len(FLAT) and shard.documents == 6
    assert np.concatenate(list(shard.document_ends())).tolist() == [4, 6, 9, 11, 14, 15]
    for start in range(len(FLAT) + 1):
        for count in range(len(FLAT) - start + 1):
            assert shard.read(start, count).tolist() == FLAT[start : start + count]
    assert shards.categories("train") == ("general",) and shards.categories("heldout") == ()
    empty = shards.shard("train", "maths")
    assert len(empty) == empty.documents == 0 and list(empty.blocks()) == list(empty.document_ends()) == []
    shards.check_ids()


@pytest.mark.parametrize("block", [1, 2, 5, 14, 15, 16])
def test_blocks_and_checks_do_not_depend_on_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Documents and files begin, end and lie anywhere in a block of tokens and in one of ends."""
    shards = TokenShards.open(write_shards(tmp_path, FILES))
    shard = shards.shard("train", "general")
    monkeypatch.setattr("components.corpus.shards._BLOCK_TOKENS", block)
    monkeypatch.setattr("components.corpus.shards._BLOCK_ENDS", max(1, block // 2))
    for count in (None, *range(len(FLAT) + 1)):
        blocks = list(shard.blocks(count))
        assert all(0 < len(tokens) <= block for tokens in blocks)
        assert [token for tokens in blocks for token in tokens.tolist()] == FLAT[:count]
    assert np.concatenate(list(shard.document_ends())).tolist() == [4, 6, 9, 11, 14, 15]
    shards.check_ids()
    path = tmp_path / "shards/train/general/00001.ds"
    for position in range(3):
        tokens = np.fromfile(path, "<u2")
        tokens[position] = 64
        tokens.tofile(path)
        with pytest.raises(ShardError, match=r"00001\.ds holds token id 64"):
            shards.check_ids()
        tokens[position] = [5, 6, EOS][position]
        tokens.tofile(path)


def test_a_thousand_files_need_no_thousand_descriptors(tmp_path: Path) -> None:
    """The usual limit is 1,024 open files, and every mapped file would keep one."""
    shards = TokenShards.open(write_shards(tmp_path, [[[n % EOS]] for n in range(300)]))
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert shards.shard("train", "general").read(0, 600).tolist() == [
        t for n in range(300) for t in (n % EOS, EOS)
    ]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_cut_while_in_use_is_named(tmp_path: Path) -> None:
    """A map of it would kill the process with SIGBUS."""
    shard = TokenShards.open(write_shards(tmp_path, FILES)).shard("train", "general")
    path = tmp_path / "shards/train/general/00001.ds"
    content = path.read_bytes()
    path.write_bytes(content[:3])
    with pytest.raises(ShardError, match=r"00001\.ds ends before item 3: it was cut"):
        shard.read(0, 15)
    path.unlink()
    with pytest.raises(ShardError, match=r"00001\.ds cannot be read"):
        shard.read(6, 1)
    assert shard.read(0, 6).tolist() == FLAT[:6]


def test_wrong_ends_between_the_first_and_the_last_are_found(tmp_path: Path) -> None:
    """Opening looks at the first and the last end of a file; the check of everything at each."""
    write_shards(tmp_path, FILES)
    path = tmp_path / "shards/train/general/00002.ds.index"
    for wrong, message in [(2, "rising"), (6, "rising"), (2**63 + 1, "rising"), (4, "does not end")]:
        np.array([2, wrong, 6], "<u8").tofile(path)
        with pytest.raises(ShardError, match=rf"00002\.ds.*{message}"):
            TokenShards.open(tmp_path).check_ids()
    for ends in ([0, 5, 6], [5, 5, 6], [2, 5, 7]):
        np.array(ends, "<u8").tofile(path)
        with pytest.raises(ShardError, match=r"00002\.ds"):
            TokenShards.open(tmp_path)


@pytest.mark.parametrize("start,count", [(-1, 1), (0, 16), (15, 1), (3, -1)])
def test_reading_outside_is_an_error(tmp_path: Path, start: int, count: int) -> None:
    shard = TokenShards.open(write_shards(tmp_path, FILES)).shard("train", "general")
    with pytest.raises(IndexError):
        shard.read(start, count)


@given(st.integers(0, 29))
def test_every_truncation_is_noticed(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    folder = write_shards(tmp_path_factory.mktemp("shards"), [JOINED])
    path = folder / "shards/train/general/00000.ds"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardError, match=r"general/00000\.ds is truncated"):
        TokenShards.open(folder)


@given(st.integers(0, 47))
def test_every_torn_index_is_noticed(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    folder = write_shards(tmp_path_factory.mktemp("shards"), [JOINED])
    path = folder / "shards/train/general/00000.ds.index"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardError, match=r"00000\.ds"):
        TokenShards.open(folder)


def test_missing_and_longer_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, FILES)
    path = tmp_path / "shards/train/general/00001.ds"
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(ShardError, match=r"00001\.ds is longer"):
        TokenShards.open(tmp_path)
    path.unlink()
    with pytest.raises(ShardError, match=r"00001\.ds is missing"):
        TokenShards.open(tmp_path)


def test_index_must_agree(tmp_path: Path) -> None:
    write_shards(tmp_path, FILES)
    path = tmp_path / "index.json"
    good = json.loads(path.read_text())
    for key in ("tokens", "documents"):
        bad = json.loads(path.read_text())
        bad["splits"]["train"]["general"][key] += 1
        path.write_text(json.dumps(bad))
        with pytest.raises(ShardError, match="says"):
            TokenShards.open(tmp_path)
        path.write_text(json.dumps(good))
    for broken in ("", "[]", "{}", json.dumps({**good, "dtype": "int8"}), json.dumps({**good, "eos_id": 64})):
        path.write_text(broken)
        with pytest.raises(ShardError, match=r"index\.json"):
            TokenShards.open(tmp_path)
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        TokenShards.open(tmp_path)


def test_wrong_ids_are_found(tmp_path: Path) -> None:
    write_shards(tmp_path, FILES)
    path = tmp_path / "shards/train/general/00002.ds"
    tokens = np.fromfile(path, "<u2")
    for position, value, message in [(0, 64, "token id 64"), (len(tokens) - 1, 3, "does not end")]:
        damaged = tokens.copy()
        damaged[position] = value
        damaged.tofile(path)
        with pytest.raises(ShardError, match=message):
            TokenShards.open(tmp_path).check_ids()


def test_unknown_names(tmp_path: Path) -> None:
    shards = TokenShards.open(write_shards(tmp_path, FILES))
    with pytest.raises(ShardError, match=r"no category 'x'.*general"):
        shards.shard("train", "x")
    with pytest.raises(ShardError, match=r"no split 'dev'.*train"):
        shards.shard("dev", "general")
