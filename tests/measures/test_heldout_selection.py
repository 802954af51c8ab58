"""Which held-out tokens count and how many bytes they stand for: the same as when whole splits were held in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from components.artifacts import write_json
from components.corpus.shards import TokenShards
from components.corpus.text_bytes import count_bytes, token_bytes
from components.evaluation.activations import HeldOutText
from components.evaluation.config import EvaluateConfig
from components.export.head_states import shard_streams, split_windows
from components.measures.bigram import BigramModel
from components.measures.heldout import HeldOut, fit_bigram
from components.measures.positions import document_beginnings

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CATEGORIES = ("general", "chinese", "sft")


@pytest.fixture(scope="module", params=[False, True], ids=["index without bytes", "index with bytes"])
def tokenized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 0 to 40 tokens in three files a category, special tokens within; bytes unlike theirs."""
    folder = tmp_path_factory.mktemp("tokenized")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.add_tokens(["中文", "hello"])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    random, eos = np.random.default_rng(5), tokenizer.token_to_id(SPECIAL[0])
    splits: dict[str, Any] = {"train": {}, "heldout": {}}
    for split, categories in splits.items():
        for category in CATEGORIES:
            names, tokens, documents = [], 0, 0
            for number in range(3):
                lengths = random.integers(0, 41, size=17)
                parts = [
                    np.append(random.choice([*range(256), 257, 258, 259, 260], size=n), eos) for n in lengths
                ]
                name = f"shards/{split}/{category}/{number:05}.ds"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                np.concatenate(parts).astype("<u2").tofile(folder / name)
                np.cumsum(lengths + 1).astype("<u8").tofile(folder / f"{name}.index")
                names.append(name)
                tokens, documents = tokens + int((lengths + 1).sum()), documents + 17
            categories[category] = {
                "tokens": tokens, "documents": documents, "bytes": tokens + 13, "files": names
            }  # fmt: skip
    index = {"dtype": "uint16", "vocab_size": 300, "eos_id": eos, "splits": splits}
    write_json(folder / "index.json", index)
    if request.param:
        shards, lengths_V = TokenShards.open(folder), token_bytes(tokenizer, 300)
        for category, entry in splits["heldout"].items():
            entry["token_bytes"] = count_bytes(shards.shard("heldout", category), lengths_V)
        write_json(folder / "index.json", index)
    return folder


def whole(folder: Path, split: str, category: str) -> npt.NDArray[np.int64]:
    """All tokens as the files hold them."""
    entry = json.loads((folder / "index.json").read_text())["splits"][split][category]
    return np.concatenate([np.fromfile(folder / name, "<u2") for name in entry["files"]]).astype(np.int64)


def bytes_of(folder: Path, category: str) -> int:
    entry = json.loads((folder / "index.json").read_text())["splits"]["heldout"][category]
    return int(entry["bytes"])


@pytest.mark.parametrize("limit", [64, 400, 10_000])
def test_bits_per_byte_are_of_the_same_tokens_and_bytes(tokenized: Path, limit: int) -> None:
    file = tokenized / "tokenizer" / "tokenizer.json"
    held = HeldOut.open(TokenShards.open(tokenized), file, limit)
    lengths = token_bytes(Tokenizer.from_file(str(file)), 300)
    text = HeldOutText.open(tokenized, EvaluateConfig(heldout_tokens_per_category=max(limit, 256)))
    for category in CATEGORIES:
        tokens = whole(tokenized, "heldout", category)
        stream = tokens[:limit]
        assert held.streams[category].tolist() == stream.tolist()
        counted = float(lengths[stream].sum())
        if len(stream) < len(tokens):
            counted *= bytes_of(tokenized, category) / max(float(lengths[tokens].sum()), 1.0)
        else:
            counted = float(bytes_of(tokenized, category))
        assert held.text_bytes[category] == counted
        assert text.streams[category].tolist() == tokens[: max(limit, 256)].tolist()
        floats = lengths.astype(np.float64)
        wanted = floats * (bytes_of(tokenized, category) / float(floats[tokens].sum()))
        assert text.bytes_per_token[category].tolist() == wanted.tolist()


def test_the_bigram_counts_the_same_training_tokens(tokenized: Path) -> None:
    found = fit_bigram(TokenShards.open(tokenized), 333)
    wanted = BigramModel.fit([whole(tokenized, "train", name)[:333] for name in CATEGORIES], 300)
    assert found.codes.tolist() == wanted.codes.tolist()
    assert found.discounted.tolist() == wanted.discounted.tolist()


@pytest.mark.parametrize(("length", "limit"), [(3, 1), (3, 1000), (20, 7), (40, 50), (41, 5)])
@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_the_same_documents_begin_the_windows_by_position(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch, length: int, limit: int, block: int
) -> None:
    monkeypatch.setattr("components.corpus.shards._BLOCK_ENDS", block)
    shards = TokenShards.open(tokenized)
    for category in CATEGORIES:
        stream = whole(tokenized, "heldout", category)
        ends = np.flatnonzero(stream == shards.eos_id)
        starts = np.concatenate([[0], ends[:-1] + 1])
        long = [start for start, end in zip(starts, ends, strict=True) if end - start >= length][:limit]
        wanted = [[shards.eos_id, *stream[start : start + length].tolist()] for start in long]
        found = document_beginnings(shards.shard("heldout", category), shards.eos_id, length, limit)
        assert found.shape == (len(wanted), length + 1) and found.tolist() == wanted


def test_the_head_predictor_learns_from_the_same_windows(tokenized: Path) -> None:
    parts = (0.4, 0.3, 0.3)
    for positions, window in [(600, 16), (100, 60), (10_000, 16)]:
        old = [
            whole(tokenized, "heldout", name) for name in TokenShards.open(tokenized).categories("heldout")
        ]
        new = shard_streams(tokenized, max(positions, len(parts) * window))
        for found, wanted in zip(
            split_windows(new, positions, window, parts),
            split_windows(old, positions, window, parts),
            strict=True,
        ):
            assert found.tolist() == wanted.tolist()
