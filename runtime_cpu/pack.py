"""Packing a model into the engine's own layout: ``python -m runtime_cpu.pack SRC OUT``.

``SRC`` is a stock GGUF file, or an official Hugging Face folder, whose weights are quantised first
(``huggingface.py``). The result is a GGUF file still, with the stock file's weights bit for bit: each expert is one
aligned, checksummed run of bytes in the order in which the kernels read it (``csrc/model/packed.hpp``), so an engine
under a memory budget fetches it with one read and needs no work on it. Matrices that are not Q4_0, norms and the
tokenizer are copied as they are. ``--layout stock`` stops before packing: a plain GGUF file for this and other engines.

With statistics (``--stats``: JSON with ``expert_counts`` [layers][experts], as ``Engine.stats.expert_counts`` has them)
the most used experts of each layer come first, and an engine fills its cache with them while the prompt is read.
``--head-predictor model_lm_head.pt`` adds the authors' predictor of output rows (``head_import.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import EngineError, _core
from runtime_cpu.checkpoint_files import CheckpointError
from runtime_cpu.engine import MAX_THREADS, model_file
from runtime_cpu.gguf_writer import GGUFWriteError, GGUFWriter, TensorInfo
from runtime_cpu.head_import import DEFAULT_THRESHOLD, ImportedPredictor
from runtime_cpu.head_import import FILE_NAME as PREDICTOR_NAME
from runtime_cpu.huggingface import WEIGHT_TYPES, HuggingFaceFolder
from runtime_cpu.memory import format_bytes

PACKED_VERSION = 1
LAYOUTS = ("packed", "stock")
_PREFIX = "smallthinker."
_ALIGNMENT = 4096
_TILE_ROWS, _TILE_PAIR_BYTES = 16, 576
_EXPERTS_AT_ONCE = 8
_COPY_BYTES = 8 << 20
_NO_ORDER = "statistics order the experts of a packed file; a stock file has no such order"
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
    threads = threads or _cores()
    model = _stock_model(source, predictor)
    tensors = {name: (kind, shape, offset, size) for name, kind, shape, offset, size in model.tensors()}
    others = sorted({kind for name, (kind, *_) in tensors.items() if "_exps." in name} - {"Q4_0"})
    if others:
        raise PackError(
            f"{source} holds experts of type {', '.join(others)}; packed experts are Q4_0: quantise the file first"
        )
    order = _order(expert_counts, model.layers, model.experts)

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


def pack_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    weight_type: str = "q4_0",
    layout: str = "packed",
    expert_counts: Sequence[Sequence[int]] | None = None,
    threads: int | None = None,
    advance: Callable[[int, int], None] | None = None,
    predictor: ImportedPredictor | None = None,
) -> list[str]:
    """Write the Hugging Face folder ``source`` as one file; returns warnings about what that file lacks.

    The packed layout takes a stock file on its way, ``.NAME.stock`` beside ``target``, which is removed in the end.

    Args:
        weight_type: ``"q4_0"``, ``"q8_0"``, ``"f16"`` or ``"f32"``; the packed layout needs ``"q4_0"``.
        layout: ``"packed"`` or ``"stock"``.
        expert_counts: as in :func:`pack`.
        advance: called with the bytes of weights that are converted and those that there are.
        predictor: of the head's rows, to go into the file; one that lies in the folder is not taken unasked.

    Raises:
        CheckpointError: the folder is damaged or no SmallThinker model, or the predictor another model's.
        PackError: the arguments contradict each other or the model, or the disk has no room.
        OSError: a file cannot be read or written.
    """
    target = Path(target)
    threads = threads or _cores()
    if weight_type not in WEIGHT_TYPES or layout not in LAYOUTS:
        raise PackError(f"there is no type {weight_type!r} in a layout {layout!r}")
    if target.is_dir():
        raise PackError(f"{target} is a folder; name the file to write")
    with HuggingFaceFolder(source) as folder:
        infos = folder.infos(weight_type, predictor)
        needed = sum(info.size_bytes for info in infos)
        if layout == "packed":
            others = sorted({info.type for info in infos if "_exps." in info.name} - {"Q4_0"})
            if others:
                raise PackError(
                    f"packed experts are Q4_0 and these would be {', '.join(others)}: "
                    + (
                        "choose --layout stock"
                        if weight_type == "q4_0"
                        else "choose --type q4_0 or --layout stock"
                    )
                )
            _order(expert_counts, folder.config.num_hidden_layers, folder.config.moe_num_primary_experts)
            needed *= 2
        elif expert_counts is not None:
            raise PackError(_NO_ORDER)
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise PackError(
                f"{target} needs about {format_bytes(needed)} while it is written, and {format_bytes(free)} are free"
            )
        done = 0

        def report(size: int) -> None:
            nonlocal done
            done += size
            if advance is not None:
                advance(done, folder.weight_bytes)

        unasked = folder.path / PREDICTOR_NAME
        if predictor is None and unasked.is_file():
            folder.warnings.append(
                f"{unasked} predicts which rows of the head matter; it is left out, because it can lose tokens: "
                f"--head-predictor {shlex.quote(str(unasked))} adds it, for engines that are asked to use it"
            )
        if layout == "stock":
            folder.write(target, weight_type, threads, report, predictor)
            return folder.warnings
        stock = target.with_name(f".{target.name}.stock")
        try:
            folder.write(stock, weight_type, threads, report, predictor)
            pack(stock, target, expert_counts, threads)
        finally:
            stock.unlink(missing_ok=True)
        return folder.warnings


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _copied(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    file.seek(offset)
    while size:
        piece = file.read(min(size, _COPY_BYTES))
        if not piece:
            raise PackError(f"{file.name} became shorter while it was read")
        size -= len(piece)
        yield piece


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
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="stock GGUF file with Q4_0 experts, or a Hugging Face folder"
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="where the file goes")
    parser.add_argument(
        "--type", choices=sorted(WEIGHT_TYPES), help="type of a folder's matrices (default: q4_0)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="packed", help="default: %(default)s")
    parser.add_argument("--stats", type=Path, help="JSON with expert_counts [layers][experts]")
    parser.add_argument("--threads", type=int, help="default: all allowed cores")
    parser.add_argument(
        "--head-predictor",
        type=Path,
        metavar="PT",
        help=f"add the authors' predictor of output rows ({PREDICTOR_NAME}), for engines that are asked to use it; "
        "a GGUF file then keeps its layout with --layout stock",
    )
    parser.add_argument(
        "--head-threshold",
        type=float,
        help=f"rows with a greater score are computed (default: {DEFAULT_THRESHOLD:g})",
    )
    options = parser.parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with ExitStack() as stack:
            summary = _run(options, _predictor(options, stack))
    except (OSError, EngineError, PackError, CheckpointError, GGUFWriteError) as error:
        _progress("")
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        _progress("")
        sys.stderr.write("error: interrupted; nothing was written\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.stdout.write(summary)
    return 0


def _predictor(options: argparse.Namespace, stack: ExitStack) -> ImportedPredictor | None:
    if options.head_predictor is None:
        if options.head_threshold is not None:
            raise PackError("--head-threshold belongs to --head-predictor, which is missing")
        return None
    threshold = DEFAULT_THRESHOLD if options.head_threshold is None else options.head_threshold
    return stack.enter_context(ImportedPredictor(options.head_predictor, threshold))


def _run(options: argparse.Namespace, predictor: ImportedPredictor | None) -> str:
    counts = None
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise PackError(f"--threads is {options.threads}; allowed is 1 to {MAX_THREADS}")
    if options.stats is not None:
        try:
            counts = json.loads(options.stats.read_text())["expert_counts"]
        except (ValueError, KeyError, TypeError) as error:
            raise PackError(f"{options.stats} holds no expert_counts: {error!r}") from error
    if not options.source.is_dir():
        stock = options.layout == "stock"
        if options.type is not None or (stock and predictor is None):
            raise PackError(
                "--type and --layout stock are for Hugging Face folders; a GGUF file keeps its types"
            )
        if stock and counts is not None:
            raise PackError(_NO_ORDER)
        if stock and predictor is not None:
            add_predictor(options.source, options.target, predictor)
        else:
            pack(options.source, options.target, counts, options.threads, predictor)
        return f"{options.target}: {format_bytes(options.target.stat().st_size)}\n"

    started = time.perf_counter()
    converted_s, read_bytes = 0.0, 0

    def advance(done: int, whole: int) -> None:
        nonlocal converted_s, read_bytes
        converted_s, read_bytes = time.perf_counter() - started, done
        note = f"{format_bytes(done)} of {format_bytes(whole)} converted" if done < whole else "packing"
        _progress(f"{note}, {done / 1e6 / converted_s:.0f} MB/s")

    warnings = pack_folder(
        options.source,
        options.target,
        options.type or "q4_0",
        options.layout,
        counts,
        options.threads,
        advance,
        predictor,
    )
    _progress("")
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")
    return (
        f"{options.target}: {format_bytes(options.target.stat().st_size)} in {time.perf_counter() - started:.0f} s; "
        f"{format_bytes(read_bytes)} converted at {read_bytes / 1e6 / max(converted_s, 1e-9):.0f} MB/s\n"
    )


def _end(number: int, _: object) -> NoReturn:
    """Leave by way of the clean-up, which a plain SIGTERM would skip."""
    sys.exit(128 + number)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
