"""Official Hugging Face folders as GGUF files: ``with HuggingFaceFolder(path) as folder: folder.write(out, "q4_0")``.

Reads config.json, one or many safetensors files and the tokenizer, without torch. Names, shapes, types and metadata
are those that our trainer's export writes, so a converted folder equals an exported file. Norms and routers become F32;
every other matrix takes the chosen type, as ``llama-quantize --pure`` does it.

What is read is untrusted: the first thing that does not fit config.json is a :class:`CheckpointError` before anything
is written.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_cpu.closing import ClosedAtExit
from runtime_cpu.files.checkpoint_files import CheckpointError, StoredTensor, WeightFile, read_json
from runtime_cpu.files.gguf_writer import GGUFWriter, TensorInfo, Value
from runtime_cpu.files.head_import import ImportedPredictor
from runtime_cpu.files.huggingface_config import EMBEDDING, HEAD, ConfigReader, FolderConfig, FolderTensor
from runtime_cpu.files.huggingface_vocabulary import read_vocabulary
from runtime_cpu.files.quantiser import STORAGE, WeightError, encode

# By name: storage type, and the file type number of ggml's llama_ftype.
WEIGHT_TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_BUFFER = "rotary_emb.inv_freq"  # older files store it; it follows from rope_theta
# Weights that one task converts: 4 MiB as they are read.
_AT_ONCE = 1 << 21


class HuggingFaceFolder(ClosedAtExit):
    """A checked folder, open for reading; a context manager.

    Attributes:
        config: its config.json.
        name: what the model is called: config.json's ``model_name``, else the folder's name.
        vocabulary: the tokenizer's metadata; empty if the folder has none.
        warnings: sentences about what the result will lack.
        weight_bytes: bytes of the weights that a conversion reads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a folder and check all of it but the weights themselves.

        Raises:
            CheckpointError: it is damaged or no SmallThinker model.
        """
        self.path = Path(path)
        contents = read_json(self.path / _CONFIG)
        self.config = FolderConfig.parse(contents, str(self.path / _CONFIG))
        self.name = self.config.name or self.path.resolve().name
        ends = list(self.config.eos_ids)
        generation = self.path / "generation_config.json"
        if generation.is_file():
            ends += ConfigReader(read_json(generation), str(generation)).ids("eos_token_id")
        found = read_vocabulary(self.path, self.config.vocab_size, dict.fromkeys(ends))
        self.vocabulary: dict[str, Value] = {} if found is None else found.metadata
        missing = "the folder has no tokenizer.json: the GGUF file will know token ids only"
        self.warnings = [missing] if found is None else list(found.warnings)
        self._files: list[WeightFile] = []
        self._places: dict[str, tuple[WeightFile, StoredTensor]] = {}
        try:
            self._open_weights()
            self._check_weights()
        except BaseException:
            self.close()
            raise
        self.weight_bytes = sum(
            self._places[name][1].size_bytes for tensor in self.config.tensors() for name in tensor.names
        )

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def infos(self, kind: str, predictor: ImportedPredictor | None = None) -> list[TensorInfo]:
        """The tensors of a file of type ``kind``, a key of :data:`WEIGHT_TYPES`.

        Raises:
            CheckpointError: the predictor is another model's.
        """
        infos = [tensor.info(WEIGHT_TYPES[kind][0]) for tensor in self.config.tensors()]
        if predictor is None:
            return infos
        predictor.check_model(str(self.path), self.config.hidden_size, self.config.vocab_size)
        return infos + predictor.infos()

    def write(
        self,
        target: str | os.PathLike[str],
        kind: str,
        threads: int = 1,
        advance: Callable[[int], None] | None = None,
        predictor: ImportedPredictor | None = None,
    ) -> None:
        """Write a stock GGUF file; it appears by a rename when all of it is on the disk.

        Args:
            kind: a key of :data:`WEIGHT_TYPES`.
            threads: converting threads; each holds some 30 MiB.
            advance: called with the number of bytes of weights that were converted, for a progress bar.
            predictor: of the head's rows, to go into the file.

        Raises:
            CheckpointError: a weight is not finite or too large for ``kind``, a file became shorter, or the predictor
                is another model's.
            OSError: a file cannot be read or written.
        """
        self.check_tied()
        metadata = {**self.config.metadata(self.name, WEIGHT_TYPES[kind][1]), **self.vocabulary}
        infos = self.infos(kind, predictor)
        if predictor is not None:
            metadata |= predictor.metadata()
        with (
            GGUFWriter(target, metadata, infos) as writer,
            ThreadPoolExecutor(threads, "convert") as pool,
        ):
            try:
                for tensor, info in zip(self.config.tensors(), infos, strict=predictor is None):
                    writer.write(info.name, self._converted(tensor, info.type, pool, threads + 1, advance))
                if predictor is not None:
                    for info in predictor.infos():
                        writer.write(info.name, predictor.data(info.name))
            finally:
                pool.shutdown(cancel_futures=True)

    def check_tied(self) -> None:
        """Note in ``warnings`` when a tied model carries an output matrix of its own; the embedding wins."""
        if not self.config.tied or HEAD not in self._places:
            return
        (head_file, head), (file, embedding) = self._places[HEAD], self._places[EMBEDDING]
        count = math.prod(head.shape)
        equal = head.dtype == embedding.dtype
        for start in range(0, count if equal else 0, _AT_ONCE):
            size = min(_AT_ONCE, count - start)
            left, right = head_file.read(head, start, size), file.read(embedding, start, size)
            if left.tobytes() != right.tobytes():
                equal = False
                break
        note = f"config.json ties the output matrix to the embedding; the different {HEAD} is not used"
        if not equal and note not in self.warnings:
            self.warnings.append(note)

    def _converted(
        self,
        tensor: FolderTensor,
        kind: str,
        pool: ThreadPoolExecutor,
        ahead: int,
        advance: Callable[[int], None] | None,
    ) -> Iterator[NDArray[np.uint8]]:
        """The tensor's data in pieces, in order, with at most ``ahead`` of them in memory."""
        waiting: deque[tuple[Future[NDArray[np.uint8]], int]] = deque()
        for name in tensor.names:
            file, stored = self._places[name]
            count = math.prod(tensor.shape)
            for start in range(0, count, _AT_ONCE):
                size = min(_AT_ONCE, count - start)
                task = pool.submit(_convert, file, stored, name, start, size, kind)
                waiting.append((task, size * STORAGE[stored.dtype].itemsize))
                if len(waiting) >= ahead:
                    yield _finished(*waiting.popleft(), advance)
        while waiting:
            yield _finished(*waiting.popleft(), advance)

    def _open_weights(self) -> None:
        index = self.path / _INDEX
        places: dict[str, Any] | None = None
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise CheckpointError(f"{index} has no weight_map from tensors to files")
            shards: list[Any] = sorted(dict.fromkeys(map(str, places.values())))
            for shard in shards:
                # A link is as good as a file: caches of model hubs hold nothing else.
                if not shard.endswith(".safetensors") or {"/", "\\", "\0"} & set(shard):
                    raise CheckpointError(
                        f"{index} names {shard!r}, which is no safetensors file of this folder"
                    )
            if _SINGLE not in shards and (self.path / _SINGLE).is_file():
                raise CheckpointError(
                    f"{self.path} has both {_SINGLE} and {_INDEX} without it; remove one of them"
                )
        elif (self.path / _SINGLE).is_file():
            shards = [_SINGLE]
        else:
            raise CheckpointError(f"{self.path} has neither {_INDEX} nor {_SINGLE}")
        for shard in shards:
            file = WeightFile(self.path / shard)
            self._files.append(file)
            for name, stored in file.tensors.items():
                if name in self._places:
                    raise CheckpointError(f"{name} lies in {self._places[name][0].path} and in {file.path}")
                if places is not None and places.get(name) != shard:
                    raise CheckpointError(f"{file.path} holds {name}, which {_INDEX} does not place there")
                self._places[name] = file, stored
        lacking = _some(name for name in places or () if name not in self._places)
        if lacking:
            raise CheckpointError(f"{index} places {lacking} in files that lack them")

    def _check_weights(self) -> None:
        wanted: dict[str, tuple[int, ...]] = {}

        def official() -> Iterator[tuple[str, tuple[int, ...]]]:
            return ((name, tensor.shape) for tensor in self.config.tensors() for name in tensor.names)

        missing = _some(name for name, _ in official() if name not in self._places)
        if missing:
            raise CheckpointError(f"{self.path} lacks the tensors {missing}, which config.json asks for")
        wanted = dict(official())
        optional = {HEAD: wanted[EMBEDDING]} if self.config.tied else {}
        unknown = _some(
            name
            for name in self._places
            if name not in wanted and name not in optional and not name.endswith(_BUFFER)
        )
        if unknown:
            raise CheckpointError(
                f"{self.path} holds the unknown tensors {unknown}; config.json asks for no such"
            )
        for name, shape in (wanted | optional).items():
            if name not in self._places:
                continue
            stored = self._places[name][1]
            if stored.shape != shape:
                raise CheckpointError(
                    f"{name} has the shape {list(stored.shape)}; config.json asks for {list(shape)}"
                )
            if stored.dtype not in STORAGE:
                raise CheckpointError(
                    f"{name} is stored as {stored.dtype}; {', '.join(STORAGE)} can be converted"
                )


def _convert(
    file: WeightFile, stored: StoredTensor, name: str, start: int, size: int, kind: str
) -> NDArray[np.uint8]:
    try:
        return encode(file.read(stored, start, size), stored.dtype, kind)
    except WeightError as error:
        raise CheckpointError(f"{name} holds {error}") from None


def _finished(
    task: Future[NDArray[np.uint8]], size: int, advance: Callable[[int], None] | None
) -> NDArray[np.uint8]:
    result = task.result()
    if advance is not None:
        advance(size)
    return result


def _some(names: Iterator[str]) -> str:
    """The first three, or nothing."""
    first = [name for name, _ in zip(names, range(4), strict=False)]
    return ", ".join(first[:3]) + (" and more" if len(first) > 3 else "")
