"""Packing a stock GGUF file into the engine's own layout: ``python -m runtime_cpu.pack SRC OUT``.

The result is a GGUF file still, with the same weights bit for bit: each expert is one aligned, checksummed run of bytes
in the order in which the kernels read it (``csrc/packed.hpp``), so an engine under a memory budget fetches it with one
read and needs no work on it. Matrices that are not Q4_0, norms and the tokenizer are copied as they are.

With statistics (``--stats``: JSON with ``expert_counts`` [layers][experts], as ``Engine.stats.expert_counts`` has them)
the most used experts of each layer come first, and an engine fills its cache with them while the prompt is read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import EngineError, _core
from runtime_cpu.gguf_writer import GGUFWriteError, GGUFWriter, TensorInfo
from runtime_cpu.memory import format_bytes

PACKED_VERSION = 1
_PREFIX = "smallthinker."
_ALIGNMENT = 4096
_TILE_ROWS, _TILE_PAIR_BYTES = 16, 576
_EXPERTS_AT_ONCE = 8
_OWN_KEYS = ("general.alignment", f"{_PREFIX}vocab_size", f"{_PREFIX}expert_counts")


class PackError(Exception):
    """The file cannot be packed; the message says why."""


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    expert_counts: Sequence[Sequence[int]] | None = None,
    threads: int | None = None,
) -> None:
    """Write the stock GGUF file ``source`` in the packed layout to ``target``.

    Streams: besides the two files' pages it holds one matrix or some experts at a time. ``target`` appears by a rename
    when all of it is on the disk.

    Args:
        expert_counts: how often each expert was chosen, [layers][experts].
        threads: by default the cores that this process may use.

    Raises:
        PackError: ``source`` is packed already, has experts that are not Q4_0, or ``expert_counts`` has another shape.
        ModelFileError: ``source`` is damaged or no SmallThinker model.
        OSError: a file cannot be read or written.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"there is no model file at {source}")
    if target.exists() and target.samefile(source):
        raise PackError(f"{target} is the source itself; choose another name")
    threads = threads or len(os.sched_getaffinity(0))
    model = _core.Model.open(str(source))
    if model.packed:
        raise PackError(f"{source} is packed already")
    tensors = {name: (kind, shape, offset, size) for name, kind, shape, offset, size in model.tensors()}
    others = sorted({kind for name, (kind, *_) in tensors.items() if "_exps." in name} - {"Q4_0"})
    if others:
        raise PackError(
            f"{source} holds experts of type {', '.join(others)}; packed experts are Q4_0: quantise the file first"
        )
    order = _order(expert_counts, model.layers, model.experts)
    file = np.memmap(source, np.uint8, "r")

    # Small and dense tensors first, in the order of the file; then the experts, layer by layer.
    infos, tiled = [], {}
    for name, (kind, shape, _, _) in tensors.items():
        if "_exps." in name:
            continue
        keeps_rows = name == "token_embd.weight" and not model.tied_embeddings  # looked up, never multiplied
        if kind == "Q4_0" and len(shape) == 2 and not keeps_rows:
            tiled[name] = name.removesuffix(".weight")
            pairs, tiles = (shape[0] // 32 + 1) // 2, -(-shape[1] // _TILE_ROWS)
            infos.append(TensorInfo(f"{tiled[name]}.tiles", "I8", (pairs * _TILE_PAIR_BYTES, tiles)))
        else:
            infos.append(TensorInfo(name, kind, tuple(shape)))
    kept = [name for name in tensors if "_exps." not in name]
    infos += [
        TensorInfo(f"blk.{layer}.ffn_experts.packed", "I8", (model.expert_bytes, model.experts))
        for layer in range(model.layers)
    ]
    infos.append(TensorInfo("experts.checksums", "I8", (16, model.experts, model.layers)))

    metadata = {key: value for key, value in model.metadata().items() if key not in _OWN_KEYS}
    metadata = {key: _typed(value) for key, value in metadata.items()}
    metadata[f"{_PREFIX}packed.version"] = np.uint32(PACKED_VERSION)
    metadata[f"{_PREFIX}vocab_size"] = np.uint32(model.vocab_size)
    for name, stem in tiled.items():
        metadata[f"{_PREFIX}packed.checksum.{stem}"] = np.uint64(
            _core.checksum64(model.pack_tiles(name, threads))
        )
    if expert_counts is not None:
        metadata[f"{_PREFIX}expert_counts"] = np.asarray(expert_counts, np.int64).ravel()
        metadata[f"{_PREFIX}packed.expert_order"] = order.ravel()

    checksums = np.zeros((model.layers, model.experts, 2), np.uint64)

    def experts(layer: int) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, model.experts, _EXPERTS_AT_ONCE):
            ids = order[layer, start : start + _EXPERTS_AT_ONCE].tolist()
            data, sums = model.pack_experts(layer, ids, threads)
            checksums[layer, ids] = np.asarray(sums, np.uint64).reshape(-1, 2)
            yield data

    with GGUFWriter(target, metadata, infos, alignment=_ALIGNMENT) as writer:
        for name in kept:
            if name in tiled:
                writer.write(f"{tiled[name]}.tiles", model.pack_tiles(name, threads))
            else:
                _, _, offset, size = tensors[name]
                writer.write(name, np.asarray(file[offset : offset + size]))
        for layer in range(model.layers):
            writer.write(f"blk.{layer}.ffn_experts.packed", experts(layer))
        writer.write("experts.checksums", checksums.view(np.uint8).ravel())


def _order(expert_counts: Sequence[Sequence[int]] | None, layers: int, experts: int) -> NDArray[np.int32]:
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


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the source or the statistics are unusable, or the target cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.pack", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="stock GGUF file with Q4_0 experts")
    parser.add_argument("target", type=Path, metavar="OUT", help="where the packed file goes")
    parser.add_argument("--stats", type=Path, help="JSON with expert_counts [layers][experts]")
    parser.add_argument("--threads", type=int, help="default: all allowed cores")
    options = parser.parse_args(arguments)
    try:
        counts = None
        if options.stats is not None:
            try:
                counts = json.loads(options.stats.read_text())["expert_counts"]
            except (ValueError, KeyError, TypeError) as error:
                raise PackError(f"{options.stats} holds no expert_counts: {error!r}") from error
        pack(options.source, options.target, counts, options.threads)
    except (OSError, EngineError, PackError, GGUFWriteError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{options.target}: {format_bytes(options.target.stat().st_size)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
