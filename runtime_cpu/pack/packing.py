"""Packing a stock GGUF file into the engine's own layout: ``pack("stock.gguf", "packed.gguf")``.

The result is a GGUF file still, with the stock file's weights bit for bit: each expert is one aligned, checksummed run
of bytes in the order in which the kernels read it (``csrc/model/packed.hpp``), so an engine under a memory budget
fetches it with one read and needs no work on it. Matrices that are not Q4_0, norms and the tokenizer are copied as they
are.

With statistics (``expert_counts`` [layers][experts], as ``Engine.stats.expert_counts`` has them) the most used experts
of each layer come first, and an engine fills its cache with them while the prompt is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import _core
from runtime_cpu.engine.options import available_cores, model_file
from runtime_cpu.files.gguf_writer import GGUFWriter, TensorInfo
from runtime_cpu.files.head_import import ImportedPredictor

PACKED_VERSION = 1
_PREFIX = "smallthinker."
_ALIGNMENT = 4096
_TILE_ROWS, _TILE_PAIR_BYTES = 16, 576
_EXPERTS_AT_ONCE = 8
_COPY_BYTES = 8 << 20
STOCK_HAS_NO_ORDER = "statistics order the experts of a packed file; a stock file has no such order"
_OWN_KEYS = ("general.alignment", f"{_PREFIX}vocab_size", f"{_PREFIX}expert_counts")


class PackError(Exception):
    """The file cannot be packed; the message says why."""


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    expert_counts: Sequence[Sequence[int]] | None = None,
    threads: int | None = None,
    predictor: ImportedPredictor | None = None,
) -> None:
    """Write the stock GGUF file ``source`` in the packed layout to ``target``.

    Streams: it holds one matrix or some experts at a time, and no more of the source.
    ``target`` appears by a rename when all of it is on the disk.

    Args:
        expert_counts: how often each expert was chosen, [layers][experts].
        threads: by default the cores that this process may use.
        predictor: of the head's rows, to go into the file.

    Raises:
        PackError: ``source`` is packed already, has experts that are not Q4_0, or ``expert_counts`` has another shape.
        CheckpointError: ``predictor`` is another model's, or damaged.
        ModelFileError: ``source`` is damaged or no SmallThinker model.
        OSError: a file cannot be read or written.
    """
    source, target = _different(source, target)
    threads = threads or available_cores()
    model = _stock_model(source, predictor)
    tensors = {name: (kind, shape, offset, size) for name, kind, shape, offset, size in model.tensors()}
    others = sorted({kind for name, (kind, *_) in tensors.items() if "_exps." in name} - {"Q4_0"})
    if others:
        raise PackError(
            f"{source} holds experts of type {', '.join(others)}; packed experts are Q4_0: quantise the file first"
        )
    order = expert_order(expert_counts, model.layers, model.experts)

    # Small and dense tensors first, in the order of the file; then the experts, layer by layer.
    infos, tiled = [], {}
    for name, (kind, shape, _, _) in tensors.items():
        if "_exps." in name:
            continue
        keeps_rows = name == "token_embd.weight" and not model.tied_embeddings  # looked up, never multiplied
        if kind == "Q4_0" and len(shape) == 2 and not keeps_rows:
            tiled[name] = name.removesuffix(".weight")
            infos.append(_tiles_info(tiled[name], shape))
        else:
            infos.append(TensorInfo(name, kind, tuple(shape)))
    kept = [name for name in tensors if "_exps." not in name]
    added: dict[str, tuple[TensorInfo, str | None]] = {}  # with the name of its data if that is packed
    for info in predictor.infos() if predictor is not None else ():
        stem = info.name.removesuffix(".weight")
        if info.type == "Q4_0":
            added[info.name] = _tiles_info(stem, info.shape), stem
        else:
            added[info.name] = info, None
    infos += [info for info, _ in added.values()]
    infos += [
        TensorInfo(f"blk.{layer}.ffn_experts.packed", "I8", (model.expert_bytes, model.experts))
        for layer in range(model.layers)
    ]
    infos.append(TensorInfo("experts.checksums", "I8", (16, model.experts, model.layers)))

    metadata = _metadata(model, _OWN_KEYS, predictor)
    metadata[f"{_PREFIX}packed.version"] = np.uint32(PACKED_VERSION)
    metadata[f"{_PREFIX}vocab_size"] = np.uint32(model.vocab_size)
    for name, stem in tiled.items():
        metadata[f"{_PREFIX}packed.checksum.{stem}"] = np.uint64(
            _core.checksum64(_core.pack_tiles(model, name, threads=threads))
        )
    for name, (_, packed) in added.items():
        if packed is not None:
            sums = _core.checksum64(_predictor_tiles(predictor, name, threads))
            metadata[f"{_PREFIX}packed.checksum.{packed}"] = np.uint64(sums)
    if expert_counts is not None:
        metadata[f"{_PREFIX}expert_counts"] = np.asarray(expert_counts, np.int64).ravel()
        metadata[f"{_PREFIX}packed.expert_order"] = order.ravel()

    checksums = np.zeros((model.layers, model.experts, 2), np.uint64)

    def experts(layer: int) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, model.experts, _EXPERTS_AT_ONCE):
            ids = order[layer, start : start + _EXPERTS_AT_ONCE].tolist()
            data, sums = _core.pack_experts(model, layer, ids=ids, threads=threads)
            checksums[layer, ids] = np.asarray(sums, np.uint64).reshape(-1, 2)
            yield data

    with source.open("rb") as file, GGUFWriter(target, metadata, infos, alignment=_ALIGNMENT) as writer:
        for name in kept:
            if name in tiled:
                writer.write(f"{tiled[name]}.tiles", _core.pack_tiles(model, name, threads=threads))
            else:
                _, _, offset, size = tensors[name]
                writer.write(name, _copied(file, offset, size))
        for name, (info, packed) in added.items():
            assert predictor is not None
            data = predictor.data(name) if packed is None else _predictor_tiles(predictor, name, threads)
            writer.write(info.name, data)
        for layer in range(model.layers):
            writer.write(f"blk.{layer}.ffn_experts.packed", experts(layer))
        writer.write("experts.checksums", checksums.view(np.uint8).ravel())


def add_predictor(
    source: str | os.PathLike[str], target: str | os.PathLike[str], predictor: ImportedPredictor
) -> None:
    """Write the stock GGUF file ``source`` with a predictor of the head's rows to ``target``; weights are copied.

    Raises:
        PackError, CheckpointError, ModelFileError, OSError: as :func:`pack`.
    """
    source, target = _different(source, target)
    model = _stock_model(source, predictor)
    tensors = model.tensors()
    infos = [TensorInfo(name, kind, tuple(shape)) for name, kind, shape, _, _ in tensors]
    metadata = _metadata(model, ("general.alignment",), predictor)
    with source.open("rb") as file, GGUFWriter(target, metadata, infos + predictor.infos()) as writer:
        for name, _, _, offset, size in tensors:
            writer.write(name, _copied(file, offset, size))
        for info in predictor.infos():
            writer.write(info.name, predictor.data(info.name))


def _different(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> tuple[Path, Path]:
    source, target = model_file(source), Path(target)
    if target.exists() and target.samefile(source):
        raise PackError(f"{target} is the source itself; choose another name")
    return source, target


def _stock_model(source: Path, predictor: ImportedPredictor | None) -> _core.Model:
    model = _core.Model.open(str(source))
    if model.packed:
        raise PackError(f"{source} is packed already")
    if predictor is not None:
        if model.head_predictor is not None:
            raise PackError(f"{source} has a predictor of its head's rows already")
        predictor.check_model(str(source), model.hidden, model.vocab_size)
    return model


def _metadata(
    model: _core.Model, without: Sequence[str], predictor: ImportedPredictor | None
) -> dict[str, Any]:
    metadata = {key: _typed(value) for key, value in model.metadata().items() if key not in without}
    return metadata if predictor is None else metadata | predictor.metadata()


def _tiles_info(stem: str, shape: Sequence[int]) -> TensorInfo:
    pairs, tiles = (shape[0] // 32 + 1) // 2, -(-shape[1] // _TILE_ROWS)
    return TensorInfo(f"{stem}.tiles", "I8", (pairs * _TILE_PAIR_BYTES, tiles))


def _predictor_tiles(predictor: ImportedPredictor | None, name: str, threads: int) -> NDArray[np.uint8]:
    assert predictor is not None
    columns = next(info.shape[0] for info in predictor.infos() if info.name == name)
    return _core.pack_rows(np.concatenate(list(predictor.data(name))), columns=columns, threads=threads)


def _copied(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    file.seek(offset)
    while size:
        piece = file.read(min(size, _COPY_BYTES))
        if not piece:
            raise PackError(f"{file.name} became shorter while it was read")
        size -= len(piece)
        yield piece


def expert_order(
    expert_counts: Sequence[Sequence[int]] | None, layers: int, experts: int
) -> NDArray[np.int32]:
    """[layers][place]: which expert lies there."""
    if expert_counts is None:
        return np.tile(np.arange(experts, dtype=np.int32), (layers, 1))
    try:
        counts = np.asarray(expert_counts, np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise PackError(f"expert_counts are no whole numbers: {error}") from error
    if counts.shape != (layers, experts) or counts.min() < 0:
        raise PackError(
            f"expert_counts have the shape {counts.shape}; the model has {layers} layers of {experts} experts, "
            "and no count is below 0"
        )
    return np.argsort(-counts, axis=1, kind="stable").astype(np.int32)


def _typed(value: Any) -> Any:
    """Integers that the writer would take for another type than most readers expect keep a 32-bit one."""
    if isinstance(value, list) and not value:
        return np.zeros(0, np.int32)
    return value
