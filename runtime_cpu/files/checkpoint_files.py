"""The files of a Hugging Face folder, read as untrusted bytes: ``read_json(path)`` and ``WeightFile(path)``.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON with the tensors' types, shapes and byte
ranges, and the tensors (https://github.com/huggingface/safetensors, "Format"). As that format asks, ranges fill the
rest of the file without holes, and names are unique. Weights are read, not mapped: a slice at a time costs that slice
of memory and no more, and a file that shrinks meanwhile is an error of this file and no SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from runtime_cpu.files.quantiser import STORAGE

# The 21B's 10,351 tensors need 1.5 MB in one header. The format allows 100 MB, which Python would hold as gigabytes.
MAX_HEADER_BYTES = 16 << 20
MAX_TEXT_BYTES = 64 << 20
_MAX_DIMENSIONS = 8
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint folder is incomplete, damaged, or no SmallThinker model; the message says where."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no such file, or it holds anything but one JSON object with unique keys.
    """
    return _parse_json(read_text(path), str(path))


def read_text(path: Path) -> str:
    """A whole file of UTF-8.

    Raises:
        CheckpointError: no such file, one that is too large to be what it should be, or other bytes.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; at most {MAX_TEXT_BYTES} are read")
    return _decoded(path.read_bytes(), str(path))


def _decoded(data: bytes | bytearray, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source} is no UTF-8 text: {error}") from None


def _parse_json(text: str, source: str) -> dict[str, Any]:
    try:
        contents = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is no valid JSON: {error}") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{source} holds a JSON {type(contents).__name__}, not an object")
    return contents


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return result


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry: ``dtype`` as the file names it, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class WeightFile:
    """One safetensors file, open for reading. Threads may read at once.

    Attributes:
        tensors: entries by name, in the order of their bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open and check a file; no weight is read.

        Raises:
            CheckpointError: it is missing or no sound safetensors file.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no regular file")
            self.tensors = self._header(status.st_size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, tensor: StoredTensor, start: int, count: int) -> NDArray[Any]:
        """``count`` elements from ``start`` on, in row order, with dtype ``STORAGE[tensor.dtype]``.

        Raises:
            CheckpointError: the file has become shorter.
        """
        storage = STORAGE[tensor.dtype]
        data = self._bytes(tensor.offset + start * storage.itemsize, count * storage.itemsize)
        return np.frombuffer(data, storage)

    def _bytes(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path} ends at byte {offset + done}, inside its weights")
            done += count
        return data

    def _header(self, file_bytes: int) -> dict[str, StoredTensor]:
        if file_bytes < 8:
            raise CheckpointError(f"{self.path} has {file_bytes} bytes; a safetensors file has 8 and more")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > file_bytes - 8:
            raise CheckpointError(
                f"{self.path} says that its header has {length} bytes; the file has {file_bytes}"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
            )
        text = _decoded(self._bytes(8, length), f"the header of {self.path}")
        if text[:1] != "{":
            raise CheckpointError(f"the header of {self.path} does not begin with '{{'")
        header = _parse_json(text, f"the header of {self.path}")
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
            raise CheckpointError(
                f"the header of {self.path} has a __metadata__ that does not map text to text"
            )
        room = file_bytes - 8 - length
        entries = {name: self._entry(name, value, 8 + length, room) for name, value in header.items()}
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)))
        end, previous = 8 + length, "the header"
        for name, entry in ordered.items():
            if entry.offset != end:
                how = "overlaps" if entry.offset < end else "leaves a hole behind"
                raise CheckpointError(f"{self.path}: the tensor {name} {how} {previous}")
            end, previous = entry.offset + entry.size_bytes, name
        if end != file_bytes:
            raise CheckpointError(
                f"{self.path} has {file_bytes - end} bytes behind {previous} that belong to no tensor"
            )
        return ordered

    def _entry(self, name: str, value: Any, begin: int, room: int) -> StoredTensor:
        where = f"{self.path}: the tensor {name}"
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where} needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise CheckpointError(f"{where} has the type {dtype!r}, which the format does not know")
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_size, shape)):
            raise CheckpointError(f"{where} has the impossible shape {str(shape)[:80]}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            raise CheckpointError(f"{where} has the impossible data_offsets {str(offsets)[:80]}")
        start, stop = offsets
        if not start <= stop <= room:
            raise CheckpointError(f"{where} lies at bytes {start} to {stop}; the file has {room} for tensors")
        if stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise CheckpointError(f"{where} has {stop - start} bytes; {dtype} {shape} needs another number")
        return StoredTensor(dtype, tuple(shape), begin + start, stop - start)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
