"""Reads token shards: ``TokenShards.open(folder).shard("train", "general").read(0, 257)``.

Shards are datatrove's ``.ds`` files: little-endian token ids, every document ends with ``<|endoftext|>``;
a ``.ds.index`` holds the document ends (uint64, in tokens). ``index.json`` says what there should be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.artifacts import StageError
from components.corpus.categories import CATEGORIES

INDEX_NAME = "index.json"
TRAIN_SPLIT = "train"
HELD_OUT_SPLIT = "heldout"
TOKENIZER_FOLDER = "tokenizer"
"""Beside the shards: the tokenizer that made them, in Hugging Face's layout."""
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_END_DTYPE = np.dtype("<u8")
_SCAN_TOKENS = 1 << 22

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class ShardError(StageError):
    """Token shards are missing, torn or disagree with their index; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """The tokens of one (split, category), memory mapped.

    Attributes:
        pieces: one array [T_i] per file, in order.
        document_ends: [documents] int64, position after each document's ``<|endoftext|>`` in all tokens.
        bytes: UTF-8 bytes of the text behind the tokens, for bits per byte.
        files: names relative to the folder that holds ``index.json``.
    """

    pieces: tuple[TokenArray, ...]
    document_ends: npt.NDArray[np.int64]
    bytes: int
    files: tuple[str, ...]
    dtype: np.dtype[Any]

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """First position of every piece, and the total: [pieces + 1]."""
        return np.cumsum([0, *(len(piece) for piece in self.pieces)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def tokens(self) -> TokenArray:
        """All tokens as one array [T]: the memory map itself for a single file, a copy for several."""
        if len(self.pieces) == 1:
            return self.pieces[0]
        return np.concatenate([np.empty(0, self.dtype), *self.pieces])

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens [start, start + count) as a new array [count], across files.

        Raises:
            IndexError: the range is not inside [0, len(self)].
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens [{start}, {start + count}) are outside of [0, {len(self)})")
        result = np.empty(count, self.dtype)
        done = 0
        while done < count:
            piece = int(np.searchsorted(self.starts, start + done, side="right")) - 1
            offset = start + done - int(self.starts[piece])
            part = self.pieces[piece][offset : offset + count - done]
            result[done : done + len(part)] = part
            done += len(part)
        return result

    def documents(self) -> Iterator[TokenArray]:
        """Every document [T_d], with its closing ``<|endoftext|>``."""
        start = 0
        for end in self.document_ends.tolist():
            yield self.read(start, end - start)
            start = end


@dataclass(frozen=True)
class TokenShards:
    """A folder of token shards whose sizes agree with its index."""

    folder: Path
    dtype: np.dtype[Any]
    vocab_size: int
    eos_id: int
    shards: dict[str, dict[str, Shard]]

    @classmethod
    def open(cls, folder: Path | str) -> TokenShards:
        """Open the artefact of the ``tokenize`` stage and check every file's size and boundaries.

        Raises:
            ShardError: ``index.json`` is missing or malformed, or a shard is missing or torn.
        """
        folder = Path(folder)
        index_path = folder / INDEX_NAME
        try:
            index = json.loads(index_path.read_text())
            dtype = _DTYPES[index["dtype"]]
            vocab_size, eos_id = int(index["vocab_size"]), int(index["eos_id"])
            splits = index["splits"]
            shards = {
                str(split): {
                    str(name): _open_shard(folder, entry, dtype) for name, entry in categories.items()
                }
                for split, categories in splits.items()
            }
        except FileNotFoundError as error:
            raise ShardError(f"{index_path} is missing: {folder} does not hold token shards") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{index_path} is not a valid index of token shards ({error!r})") from error
        if not 0 <= eos_id < vocab_size <= np.iinfo(dtype).max + 1:
            raise ShardError(f"{index_path}: eos_id {eos_id} and vocab_size {vocab_size} do not fit {dtype}")
        return cls(folder, dtype, vocab_size, eos_id, shards)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the index's order."""
        return tuple(self.shards)

    def categories(self, split: str) -> tuple[str, ...]:
        """Names of a split's categories that hold tokens, in the project's order."""
        return tuple(name for name, shard in self._split(split).items() if len(shard))

    def shard(self, split: str, category: str) -> Shard:
        """The tokens of one category; empty when the index lists it with no tokens.

        Raises:
            ShardError: the index has no such split or category.
        """
        categories = self._split(split)
        if category not in categories:
            raise ShardError(
                f"no category {category!r} in split {split!r}; there are {', '.join(categories)}"
            )
        return categories[category]

    def _split(self, split: str) -> dict[str, Shard]:
        if split not in self.shards:
            raise ShardError(f"no split {split!r} in {self.folder}; there are {', '.join(self.shards)}")
        return self.shards[split]

    def check_ids(self) -> None:
        """Read every token: ids must be below ``vocab_size`` and documents must end with ``eos_id``.

        Raises:
            ShardError: names the first file that holds a wrong id.
        """
        for categories in self.shards.values():
            for shard in categories.values():
                for piece, name in zip(shard.pieces, shard.files, strict=True):
                    for start in range(0, len(piece), _SCAN_TOKENS):
                        top = int(piece[start : start + _SCAN_TOKENS].max())
                        if top >= self.vocab_size:
                            raise ShardError(
                                f"{name} holds token id {top}; the vocabulary ends at {self.vocab_size}"
                            )
                for piece, name, first in zip(shard.pieces, shard.files, shard.starts, strict=False):
                    ends = shard.document_ends - first
                    ends = ends[(ends > 0) & (ends <= len(piece))]
                    if len(ends) and not bool((piece[ends - 1] == self.eos_id).all()):
                        raise ShardError(f"{name} has a document that does not end with token {self.eos_id}")


def _order(category: str) -> tuple[int, str]:
    return (CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES), category)


def _open_shard(folder: Path, entry: dict[str, Any], dtype: np.dtype[Any]) -> Shard:
    pieces: list[TokenArray] = []
    ends: list[npt.NDArray[np.int64]] = []
    total = 0
    for name in entry["files"]:
        piece, piece_ends = _open_piece(folder, str(name), dtype)
        pieces.append(piece)
        ends.append(piece_ends + total)
        total += len(piece)
    document_ends = np.concatenate([np.empty(0, np.int64), *ends])
    names = ", ".join(entry["files"]) or "no files"
    if total != entry["tokens"]:
        raise ShardError(f"{names}: {total} tokens on disk, {INDEX_NAME} says {entry['tokens']}")
    if len(document_ends) != entry["documents"]:
        raise ShardError(f"{names}: {len(document_ends)} documents, {INDEX_NAME} says {entry['documents']}")
    return Shard(tuple(pieces), document_ends, int(entry["bytes"]), tuple(map(str, entry["files"])), dtype)


def _open_piece(folder: Path, name: str, dtype: np.dtype[Any]) -> tuple[TokenArray, npt.NDArray[np.int64]]:
    path, index_path = folder / name, folder / f"{name}.index"
    for part in (path, index_path):
        if not part.is_file():
            raise ShardError(f"the token shard {part.relative_to(folder)} is missing from {folder}")
    raw = index_path.read_bytes()
    if len(raw) % _END_DTYPE.itemsize:
        raise ShardError(f"{name}.index is torn: {len(raw)} bytes are not a whole number of uint64")
    ends = np.frombuffer(raw, _END_DTYPE).astype(np.int64)
    if len(ends) == 0 or ends[0] <= 0 or bool((np.diff(ends) <= 0).any()):
        raise ShardError(f"{name}.index is not a rising list of document ends")
    expected, found = int(ends[-1]) * dtype.itemsize, path.stat().st_size
    if found != expected:
        state = "truncated" if found < expected else "longer than its index says"
        raise ShardError(f"the token shard {name} is {state}: {found} bytes, expected {expected}")
    return np.memmap(path, dtype=dtype, mode="r"), ends
