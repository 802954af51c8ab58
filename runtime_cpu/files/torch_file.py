"""Dictionaries of tensors as ``torch.save`` writes them, read without torch: ``with TorchFile("weights.pt") as file``.

The format (torch/serialization.py since 1.6): a zip archive of uncompressed entries below one folder; ``data.pkl``
is a pickle whose tensors name their storages by persistent ids, and ``data/KEY`` holds a storage's elements.

A pickle is a program. This one is run with nothing in reach but a dictionary, the record that a tensor becomes, and the
names of three storage classes; any other name ends the reading before anything is called. The pickle is small or
refused, checksums of all storages are checked when the file is opened, and weights are read a slice at a time.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime_cpu.closing import ClosedAtExit
from runtime_cpu.files.checkpoint_files import CheckpointError
from runtime_cpu.files.quantiser import STORAGE

MAX_PICKLE_BYTES = 64 << 10  # two tensors need 400
_MAX_READ_BYTES = 1 << 20  # at once: among others the archive's directory
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_T = TypeVar("_T")
_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}


@dataclass(frozen=True)
class TorchTensor:
    """A tensor's place: ``count`` elements of ``dtype`` from element ``offset`` of the storage ``key`` on."""

    dtype: str
    shape: tuple[int, ...]
    key: str
    offset: int

    @property
    def count(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


# Tuples, because a pickle may ask to change an object's attributes afterwards, and these have none that change.
class _Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class _View(NamedTuple):
    """What a tensor was pickled as, unchecked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Refused(Exception):
    """What the pickle asks for, as the end of a sentence."""


class TorchFile(ClosedAtExit):
    """One file, open for reading; a context manager.

    Attributes:
        tensors: by name, in the order of the dictionary.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file and check all of it.

        Raises:
            CheckpointError: it is missing, damaged, of another format, or holds anything but a dictionary of
                contiguous float32, float16 or bfloat16 tensors.
        """
        self.path = Path(path)
        try:
            if not self.path.is_file():
                raise CheckpointError(f"{self.path} is {'missing' if not self.path.exists() else 'no file'}")
            self._file = _Bounded(self.path, "rb")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        try:
            self._archive = self._open()
            self._entries = self._directory()
            self.tensors = self._tensors()
            self._check_storages()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._file.close()

    def read(self, name: str, at_once: int) -> Iterator[NDArray[Any]]:
        """The tensor ``name`` in slices of at most ``at_once`` elements, with dtype ``STORAGE[tensor.dtype]``.

        Raises:
            CheckpointError: the file has changed since it was opened.
        """
        tensor = self.tensors[name]
        storage = STORAGE[tensor.dtype]
        with self._entry(f"data/{tensor.key}") as entry:
            self._guarded(entry.seek, tensor.offset * storage.itemsize)
            for start in range(0, tensor.count, at_once):
                size = min(at_once, tensor.count - start) * storage.itemsize
                yield np.frombuffer(self._exactly(entry, size), storage)

    def _exactly(self, entry: IO[bytes], size: int) -> bytes:
        parts = []
        while size:
            part = self._guarded(entry.read, min(size, _MAX_READ_BYTES))
            if not part:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _open(self) -> zipfile.ZipFile:
        head = self._file.read(len(_LEGACY_MAGIC))
        if head == _LEGACY_MAGIC:
            raise CheckpointError(
                f"{self.path} has torch's format from before version 1.6; load and save it with a newer torch"
            )
        if not head.startswith(b"PK\x03\x04"):
            raise CheckpointError(f"{self.path} is no file that torch.save wrote: it is no zip archive")
        self._file.seek(0)
        return self._guarded(zipfile.ZipFile, self._file)

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        """Entries by name below the archive's one folder."""
        entries: dict[str, zipfile.ZipInfo] = {}
        folders = set()
        for info in self._archive.infolist():
            folder, _, name = info.filename.partition("/")
            folders.add(folder)
            if name in entries:
                raise CheckpointError(f"{self.path} holds {name[:80]!r} twice")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(f"{self.path} compresses {name[:80]!r}, as torch.save never does")
            entries[name] = info
        if len(folders) != 1 or "data.pkl" not in entries:
            raise CheckpointError(f"{self.path} is no file that torch.save wrote: it has no data.pkl")
        self._entries = entries
        order = self._small("byteorder") if "byteorder" in entries else b"little"  # older torch did not say
        if order != b"little":
            raise CheckpointError(f"{self.path} has the byte order {order[:20]!r}; little-endian is read")
        return entries

    def _tensors(self) -> dict[str, TorchTensor]:
        data = self._small("data.pkl")
        try:
            for code, argument, _ in pickletools.genops(data):
                # Python's unpickler makes room for as many objects as the greatest number says.
                if "PUT" in code.name and isinstance(argument, int) and argument > len(data):
                    raise _Refused(f"an object with the number {argument}")
            found = _Reader(data).load()
        except _Refused as error:
            raise CheckpointError(
                f"{self.path} holds {error}; a dictionary of plain float tensors is needed"
            ) from None
        except Exception as error:  # whatever a bent pickle makes Python's unpickler raise
            raise CheckpointError(f"{self.path}: data.pkl cannot be read ({type(error).__name__})") from error
        if not isinstance(found, dict):
            kind = "tensor" if isinstance(found, _View) else type(found).__name__
            raise CheckpointError(f"{self.path} holds a {kind}; a dictionary of tensors is needed")
        tensors = {}
        for name, value in found.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{self.path} has a key that is a {type(name).__name__} and no text")
            if not isinstance(value, _View):
                raise CheckpointError(f"{self.path}: {name[:80]!r} is a {type(value).__name__} and no tensor")
            tensors[name] = self._checked(name, value)
        return tensors

    def _checked(self, name: str, view: _View) -> TorchTensor:
        where = f"{self.path}: the tensor {name[:80]!r}"
        storage, size, stride = view.storage, view.size, view.stride
        if not isinstance(storage, _Storage):
            raise CheckpointError(f"{where} has no storage")
        for what, sizes in (("shape", size), ("strides", stride)):
            if not isinstance(sizes, tuple) or len(sizes) > 8 or not all(map(_is_size, sizes)):
                raise CheckpointError(f"{where} has impossible {what}")
        step = 1
        dense: list[int] = []
        for length in reversed(size):
            dense.insert(0, step)
            step *= max(length, 1)
        if len(stride) != len(size) or any(
            length != 1 and have != want for length, have, want in zip(size, stride, dense, strict=True)
        ):
            raise CheckpointError(
                f"{where} of shape {list(size)} has the strides {list(stride)}; only contiguous ones are read"
            )
        tensor = TorchTensor(storage.dtype, size, storage.key, view.offset)
        if not _is_size(view.offset) or view.offset + tensor.count > storage.elements:
            raise CheckpointError(
                f"{where} has {tensor.count} elements from {str(view.offset)[:20]} on; its storage has "
                f"{storage.elements}"
            )
        entry = self._entries.get(f"data/{storage.key}")
        expected = storage.elements * STORAGE[storage.dtype].itemsize
        if entry is None or entry.file_size != expected:
            found = "is missing" if entry is None else f"has {entry.file_size} bytes"
            raise CheckpointError(
                f"{where} has {storage.elements} elements of {storage.dtype} in data/{storage.key[:20]}, which {found}"
            )
        return tensor

    def _check_storages(self) -> None:
        for key in dict.fromkeys(tensor.key for tensor in self.tensors.values()):
            with self._entry(f"data/{key}") as entry:
                while self._guarded(entry.read, _MAX_READ_BYTES):
                    pass

    def _entry(self, name: str) -> IO[bytes]:
        return self._guarded(self._archive.open, self._entries[name])

    def _small(self, name: str) -> bytes:
        size = self._entries[name].file_size
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{self.path}: {name} has {size} bytes; at most {MAX_PICKLE_BYTES} are read"
            )
        with self._entry(name) as entry:
            return self._guarded(entry.read)

    def _guarded(self, action: Callable[..., _T], *arguments: Any) -> _T:
        """Whatever zipfile says about a damaged archive as one kind of error."""
        try:
            return action(*arguments)
        except CheckpointError:
            raise
        except (
            zipfile.BadZipFile,
            EOFError,
            NotImplementedError,
            RuntimeError,
            ValueError,
            OSError,
        ) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from error


class _Bounded(io.FileIO):
    """A file of which nobody reads much at once: the size of an archive's directory is the file's own claim."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_READ_BYTES:
            raise CheckpointError(
                f"{self.name!s} is no file that torch.save wrote: its directory is too large"
            )
        return super().read(size) or b""


class _Reader(pickle.Unpickler):
    """Unpickles names, numbers, dictionaries and the records of tensors."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # Functions made anew: what a pickle does to them ends with it.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _View(storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda view, *_: view
        if module == "torch" and name in _STORAGES:
            return name
        if module == "torch" and name.endswith("Storage"):
            raise _Refused(f"a tensor of torch.{name[:40]}; {', '.join(_STORAGES)} can be read")
        raise _Refused(f"{module[:80]}.{name[:80]}")

    def persistent_load(self, pid: Any, /) -> Any:
        match pid:
            case ("storage", str(kind), str(key), str(), int(count)) if (
                kind in _STORAGES and _is_size(count) and key.isalnum()
            ):
                return _Storage(_STORAGES[kind], key, count)
        raise _Refused("a storage that is described in another way than torch.save does")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48
