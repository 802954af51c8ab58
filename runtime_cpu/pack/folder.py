"""A checkpoint's folder as one model file: ``pack_folder(folder, "model.gguf")``."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime_cpu.engine.options import available_cores
from runtime_cpu.files.head_import import FILE_NAME as PREDICTOR_NAME
from runtime_cpu.files.head_import import ImportedPredictor
from runtime_cpu.files.huggingface import WEIGHT_TYPES, HuggingFaceFolder
from runtime_cpu.memory.plan import format_bytes
from runtime_cpu.pack.packing import STOCK_HAS_NO_ORDER, PackError, expert_order, pack

LAYOUTS = ("packed", "stock")


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
        expert_counts: as in :func:`.pack`.
        advance: called with the bytes of weights that are converted and those that there are.
        predictor: of the head's rows, to go into the file; one that lies in the folder is not taken unasked.

    Raises:
        CheckpointError: the folder is damaged or no SmallThinker model, or the predictor another model's.
        PackError: the arguments contradict each other or the model, or the disk has no room.
        OSError: a file cannot be read or written.
    """
    target = Path(target)
    threads = threads or available_cores()
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
            expert_order(
                expert_counts, folder.config.num_hidden_layers, folder.config.moe_num_primary_experts
            )
            needed *= 2
        elif expert_counts is not None:
            raise PackError(STOCK_HAS_NO_ORDER)
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
