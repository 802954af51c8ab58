"""Reads token shards: ``TokenShards.open(folder).shard("train", "general").read(0, 257)``.

Shards are datatrove's ``.ds`` files: little-endian token ids, every document ends with ``<|endoftext|>``;
a ``.ds.index`` holds the document ends (uint64, in tokens). ``index.json`` says what there should be.

Opening costs a few small reads per file and keeps nothing that grows with tokens or documents: both are read when asked
for, by plain reads. A memory map would hold a descriptor per file, and a file that is cut while it is mapped kills the
process without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.artifacts import StageError

INDEX_NAME = "index.json"
TRAIN_SPLIT = "train"
HELD_OUT_SPLIT = "heldout"
TOKENIZER_FOLDER = "tokenizer"
"""Beside the shards: the tokenizer that made them, in Hugging Face's layout."""
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_END_DTYPE = np.dtype("<u8")
_BLOCK_TOKENS = 1 << 20
_BLOCK_ENDS = 1 << 16
# On a cluster's file system a file costs some milliseconds to look at, and there are thousands.
_OPENING_THREADS = 16

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class ShardError(StageError):
    """Token shards are missing, torn or disagree with their index; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """The tokens of one (split, category), on disk.

    Attributes:
        folder: the folder that holds ``index.json``.
        files: names relative to it, in order.
        starts: first token of every file, and the total: [files + 1].
        document_starts: likewise in documents.
        bytes: UTF-8 bytes of the text behind the tokens, for bits per byte.
        token_bytes: what the tokens stand for, in bytes; ``None`` in artefacts that do not say.
    """

    folder: Path
    files: tuple[str, ...]
    starts: npt.NDArray[np.int64]
    document_starts: npt.NDArray[np.int64]
    bytes: int
    token_bytes: int | None
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def documents(self) -> int:
        """How many documents the tokens are of."""
        return int(self.document_starts[-1])

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens [start, start + count) as a new array [count], across files.

        Raises:
            IndexError: the range is not inside [0, len(self)].
            ShardError: a file cannot be read, or was cut since the shard was opened.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens [{start}, {start + count}) are outside of [0, {len(self)})")
        result = np.empty(count, self.dtype)
        done = 0
        while done < count:
            file = int(np.searchsorted(self.starts, start + done, side="right")) - 1
            part = result[done : int(self.starts[file + 1]) - start]
            _read_into(part, self.folder, self.files[file], start + done - int(self.starts[file]))
            done += len(part)
        return result

    def blocks(self, count: int | None = None) -> Iterator[TokenArray]:
        """The first ``count`` tokens, or all, in arrays of at most 2^20."""
        count = len(self) if count is None else count
        for start in range(0, count, _BLOCK_TOKENS):
            yield self.read(start, min(_BLOCK_TOKENS, count - start))

    def document_ends(self) -> Iterator[npt.NDArray[np.int64]]:
        """Position after each document's ``<|endoftext|>`` in all tokens, in arrays of at most 2^16.

        Raises:
            ShardError: a file's ends do not rise, or it cannot be read.
        """
        for number, name in enumerate(self.files):
            previous = 0
            documents = int(self.document_starts[number + 1] - self.document_starts[number])
            for first in range(0, documents, _BLOCK_ENDS):
                raw = np.empty(min(_BLOCK_ENDS, documents - first), _END_DTYPE)
                _read_into(raw, self.folder, f"{name}.index", first)
                ends = raw.astype(np.int64)
                if bool((np.diff(ends, prepend=previous) <= 0).any()):
                    raise ShardError(f"{name}.index is not a rising list of document ends")
                previous = int(ends[-1])
                yield ends + self.starts[number]


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
        """Open the artefact of the ``tokenize`` stage and check every file's size and last document end.

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
        """Read everything: ids below ``vocab_size``, rising document ends, each document closed by ``eos_id``.

        Raises:
            ShardError: names the first file that holds something else.
        """
        for categories in self.shards.values():
            for shard in categories.values():
                self._check_shard(shard)

    def _check_shard(self, shard: Shard) -> None:
        blocks, ends, start = shard.document_ends(), np.empty(0, np.int64), 0
        for tokens in shard.blocks():
            if int(tokens.max()) >= self.vocab_size:
                wrong = int(np.argmax(tokens >= self.vocab_size))
                raise ShardError(
                    f"{_file_of(shard, start + wrong)} holds token id {tokens[wrong]}; the vocabulary ends at "
                    f"{self.vocab_size}"
                )
            stop = start + len(tokens)
            while len(ends) == 0 or ends[-1] <= stop:
                more = next(blocks, None)
                if more is None:
                    break
                ends = np.concatenate([ends, more])
            inside, ends = ends[ends <= stop], ends[ends > stop]
            wrong_ends = inside[tokens[inside - 1 - start] != self.eos_id]
            if len(wrong_ends):
                name = _file_of(shard, int(wrong_ends[0]) - 1)
                raise ShardError(f"{name} has a document that does not end with token {self.eos_id}")
            start = stop


def _file_of(shard: Shard, position: int) -> str:
    return shard.files[int(np.searchsorted(shard.starts, position, side="right")) - 1]


def _open_shard(folder: Path, entry: dict[str, Any], dtype: np.dtype[Any]) -> Shard:
    files = tuple(map(str, entry["files"]))
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        sizes = list(pool.map(lambda name: _measure(folder, name, dtype), files))
    starts = np.cumsum([0, *(tokens for tokens, _ in sizes)], dtype=np.int64)
    document_starts = np.cumsum([0, *(documents for _, documents in sizes)], dtype=np.int64)
    names = f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else "".join(files) or "no files"
    if starts[-1] != entry["tokens"]:
        raise ShardError(f"{names}: {starts[-1]} tokens on disk, {INDEX_NAME} says {entry['tokens']}")
    if document_starts[-1] != entry["documents"]:
        raise ShardError(f"{names}: {document_starts[-1]} documents, {INDEX_NAME} says {entry['documents']}")
    token_bytes = entry.get("token_bytes")
    return Shard(
        folder=folder,
        files=files,
        starts=starts,
        document_starts=document_starts,
        bytes=int(entry["bytes"]),
        token_bytes=None if token_bytes is None else int(token_bytes),
        dtype=dtype,
    )


def _measure(folder: Path, name: str, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Tokens and documents of one file, by its size and the first and the last document end."""
    for part in (name, f"{name}.index"):
        if not (folder / part).is_file():
            raise ShardError(f"the token shard {part} is missing from {folder}")
    index_bytes = (folder / f"{name}.index").stat().st_size
    documents, torn = divmod(index_bytes, _END_DTYPE.itemsize)
    if torn:
        raise ShardError(f"{name}.index is torn: {index_bytes} bytes are not a whole number of uint64")
    if documents == 0:
        raise ShardError(f"{name}.index is empty: it holds no document end")
    first, last = np.empty(1, _END_DTYPE), np.empty(1, _END_DTYPE)
    _read_into(first, folder, f"{name}.index", 0)
    _read_into(last, folder, f"{name}.index", documents - 1)
    # Every document has its closing token at least, so ends rise by one or more.
    if not 0 < int(first[0]) <= int(last[0]) - (documents - 1):
        raise ShardError(f"{name}.index is not a rising list of document ends")
    expected, found = int(last[0]) * dtype.itemsize, (folder / name).stat().st_size
    if found != expected:
        state = "truncated" if found < expected else "longer than its index says"
        raise ShardError(f"the token shard {name} is {state}: {found} bytes, expected {expected}")
    return int(last[0]), documents


def _read_into(array: npt.NDArray[Any], folder: Path, name: str, first: int) -> None:
    """Fill ``array`` with a file's items from item ``first`` on."""
    try:
        with (folder / name).open("rb") as file:
            file.seek(first * array.itemsize)
            found = file.readinto(array.view(np.uint8).data)
    except OSError as error:
        raise ShardError(f"the token shard {name} cannot be read: {error}") from error
    if found != array.nbytes:
        raise ShardError(
            f"the token shard {name} ends before item {first + len(array)}: it was cut while it was in use"
        )
