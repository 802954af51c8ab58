"""Writes GGUF version 3 files of any size in constant memory, without the ``gguf`` package.

    infos = [TensorInfo("token_embd.weight", "Q4_0", (1536, 151936))]
    with GGUFWriter(path, {"general.architecture": "smallthinker"}, infos, alignment=4096) as writer:
        writer.write("token_embd.weight", chunks)     # bytes or numpy arrays, in the order of `infos`

The header is complete before the first byte of data, so the tensors have to be declared up front. The file appears
under its name by a rename after everything is on the disk: an interrupted run leaves a ``.NAME.partial`` at most,
and removes even that unless it is killed.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# Type: (number in the file, elements of a block, bytes of a block), as in ggml.h.
_TENSOR_TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q8_0": (8, 32, 34),
    "Q6_K": (14, 256, 210),
    "I8": (24, 1, 1),
    "BF16": (30, 1, 2),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_VALUE_TYPES = {
    np.dtype(np.uint8): 0,
    np.dtype(np.int8): 1,
    np.dtype(np.uint16): 2,
    np.dtype(np.int16): 3,
    np.dtype(np.uint32): 4,
    np.dtype(np.int32): 5,
    np.dtype(np.float32): 6,
    np.dtype(np.bool_): _BOOL,
    np.dtype(np.uint64): 10,
    np.dtype(np.int64): 11,
    np.dtype(np.float64): 12,
}

Scalar = bool | int | float | str | np.generic
Value = Scalar | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str] | NDArray[Any]
Chunk = bytes | bytearray | memoryview | NDArray[Any]


class GGUFWriteError(Exception):
    """What was to be written does not make a GGUF file; the message says which key or tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry.

    Attributes:
        type: ``"F32"``, ``"F16"``, ``"Q4_0"``, ``"Q8_0"`` or ``"I8"``.
        shape: ggml's order: columns, rows, experts; 1 to 4 sizes.
    """

    name: str
    type: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.type not in _TENSOR_TYPES:
            raise GGUFWriteError(
                f"tensor {self.name} has type {self.type!r}; known are {', '.join(_TENSOR_TYPES)}"
            )
        if not 1 <= len(self.shape) <= _MAX_DIMENSIONS or min(self.shape) < 1:
            raise GGUFWriteError(f"tensor {self.name} has shape {self.shape}; it needs 1 to 4 sizes above 0")
        if not 0 < len(self.name.encode()) < 64:
            raise GGUFWriteError(f"tensor name {self.name!r} has to have 1 to 63 bytes")
        block = _TENSOR_TYPES[self.type][1]
        if self.shape[0] % block:
            raise GGUFWriteError(
                f"tensor {self.name} has {self.shape[0]} columns, which {self.type}'s blocks of {block} do not divide"
            )

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        _, block, block_bytes = _TENSOR_TYPES[self.type]
        return math.prod(self.shape) // block * block_bytes


class GGUFWriter:
    """A file under construction; a context manager. Leaving the block without an error finishes the file."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Value],
        tensors: Sequence[TensorInfo],
        alignment: int = DEFAULT_ALIGNMENT,
    ) -> None:
        """Write the header.

        Args:
            metadata: values by key. numpy scalars and arrays keep their type; ``int`` becomes uint32, int32 if
                negative, else the 64-bit type; ``float`` float32; lists of ``int`` int32 where they fit.
                ``general.alignment`` is added when it is not the default.
            tensors: in the order in which they will be written.
            alignment: every tensor starts at a multiple of this many bytes, a power of two from 8 on.

        Raises:
            GGUFWriteError: a value has no GGUF type, or a name repeats.
            OSError: the file cannot be written.
        """
        self.path = Path(path)
        if alignment < 8 or alignment & (alignment - 1):
            raise GGUFWriteError(f"alignment is {alignment}; allowed are powers of two from 8 on")
        names = [tensor.name for tensor in tensors]
        repeated = (
            sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        )
        if repeated:
            raise GGUFWriteError(f"two tensors are called {repeated[0]}")
        self._alignment = alignment
        self._infos = list(tensors)
        self._next = 0
        self.offsets: dict[str, int] = {}
        header = self._header(
            {**metadata, **({} if alignment == DEFAULT_ALIGNMENT else _alignment_key(alignment))}
        )
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._file: BinaryIO | None = self._partial.open("wb")
        try:
            self._file.write(header)
        except OSError:
            self.abandon()
            raise

    def _header(self, metadata: Mapping[str, Value]) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self._infos), len(metadata))]
        for key, value in metadata.items():
            try:
                parts.append(_text(key) + _value(value))
            except (TypeError, ValueError, OverflowError) as error:
                raise GGUFWriteError(f"metadata key {key}: {error}") from error
        position = 0
        relative = {}
        for tensor in self._infos:
            relative[tensor.name] = position
            shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            parts.append(
                _text(tensor.name) + shape + struct.pack("<IQ", _TENSOR_TYPES[tensor.type][0], position)
            )
            position += _padded(tensor.size_bytes, self._alignment)
        length = sum(map(len, parts))
        data = _padded(length, self._alignment)
        self.offsets = {name: data + offset for name, offset in relative.items()}
        self.file_bytes = data + position
        return b"".join([*parts, bytes(data - length)])

    def write(self, name: str, data: Chunk | Iterable[Chunk]) -> None:
        """Append the next tensor's data: one piece or an iterable of pieces, contiguous, of any length.

        Raises:
            GGUFWriteError: it is not this tensor's turn, or the bytes are not as many as its shape asks for.
        """
        if self._file is None:
            raise GGUFWriteError(f"{self.path} is finished or abandoned")
        expected = self._infos[self._next] if self._next < len(self._infos) else None
        if expected is None or expected.name != name:
            raise GGUFWriteError(f"tensor {name} came, {expected.name if expected else 'no tensor'} was next")
        written = 0
        pieces = [data] if isinstance(data, bytes | bytearray | memoryview | np.ndarray) else data
        for piece in pieces:
            buffer: Any = np.ascontiguousarray(piece) if isinstance(piece, np.ndarray) else piece
            view = memoryview(buffer).cast("B")
            written += len(view)
            if written > expected.size_bytes:
                break
            self._file.write(view)
        if written != expected.size_bytes:
            more = "at least " if written > expected.size_bytes else ""
            raise GGUFWriteError(
                f"tensor {name} got {more}{written} bytes; {expected.type} {expected.shape} has {expected.size_bytes}"
            )
        self._file.write(bytes(_padded(written, self._alignment) - written))
        self._next += 1

    def finish(self) -> None:
        """Bring everything to the disk and give the file its name.

        Raises:
            GGUFWriteError: tensors are missing; nothing is left behind.
        """
        if self._file is None:
            raise GGUFWriteError(f"{self.path} is finished or abandoned")
        if self._next < len(self._infos):
            name = self._infos[self._next].name
            self.abandon()
            raise GGUFWriteError(f"tensor {name} was declared and not written")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)
        except BaseException:  # a signal's exception too: nobody abandons the file after this
            self.abandon()
            raise
        self._file = None
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def abandon(self) -> None:
        """Remove what was written. Harmless after :meth:`finish`."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.abandon()


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _alignment_key(alignment: int) -> dict[str, Value]:
    return {"general.alignment": np.uint32(alignment)}


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    """A value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        array = value
    elif isinstance(value, bool | int | float | np.generic):
        scalar = value if isinstance(value, np.generic) else np.asarray(value, _number_type([value]))
        return struct.pack("<I", _VALUE_TYPES[np.dtype(scalar.dtype)]) + scalar.tobytes()
    else:
        items = list(value)
        if items and all(isinstance(item, str) for item in items):
            texts = b"".join(_text(str(item)) for item in items)
            return struct.pack("<IIQ", _ARRAY, _STRING, len(items)) + texts
        if not items:
            raise ValueError("an empty list has no type; give a numpy array")
        array = np.asarray(items, _number_type(items, "i"))
    if array.ndim != 1 or array.dtype.newbyteorder("=") not in _VALUE_TYPES:
        raise ValueError(f"an array of type {array.dtype} and shape {array.shape} has no GGUF type")
    type_number = _VALUE_TYPES[array.dtype.newbyteorder("=")]
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return struct.pack("<IIQ", _ARRAY, type_number, len(array)) + little.tobytes()


def _number_type(items: Sequence[Any], preferred: str = "u") -> Any:
    if all(isinstance(item, bool) for item in items):
        return np.bool_
    if any(isinstance(item, float) for item in items):
        return np.float32
    if not all(isinstance(item, int) for item in items):
        raise TypeError(f"{items[0]!r} has no GGUF type")
    low, high = min(items), max(items)
    if low >= 0 and preferred == "u":
        return np.uint32 if high < 1 << 32 else np.uint64
    return np.int32 if low >= -(1 << 31) and high < 1 << 31 else np.int64
