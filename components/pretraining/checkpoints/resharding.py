"""Reshards a checkpoint for another mesh: ``universal(store, checkpoint, ranks, collectives)``.

ZeRO's files hold each rank's partition of the flat optimizer state, which no other number of ranks can load.
DeepSpeed's universal checkpoint has one file per parameter and kind (fp32 weight, both moments) in the parameter's own
shape. It is made when the ranks that resume partition the state otherwise than those that saved, and kept beside the
checkpoint as ``step-00000120-universal``, sealed and verified like it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from components.artifacts import StageError, fsync_path
from components.pretraining.deepspeed.parameter_names import official_parameter, sharded_parameter
from components.pretraining.processes.collectives import Collectives
from components.pretraining.processes.ranks import Ranks, describe_mesh
from components.weights.checkpoint_store import (
    CHECKSUMS_NAME,
    Checkpoint,
    CheckpointStore,
    DamagedCheckpointError,
    checksum,
    seal,
    split_by_size,
    verify,
)


def _own_checksum(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's list of checksums: it identifies the bytes of all its files."""
    return checksum(checkpoint, [CHECKSUMS_NAME])[CHECKSUMS_NAME]["sha256"]  # type: ignore[no-any-return]


def convert(source: Path, target: Path) -> None:
    """Write the universal form of DeepSpeed's checkpoint ``source`` into the new folder ``target``."""
    from deepspeed.checkpoint import ds_to_universal  # type: ignore[import-untyped]

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # More workers are forks of this process, which has threads and, on a GPU, a CUDA context.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        ds_to_universal.main(arguments)


def _is_whole(folder: Path, origin: str, ranks: Ranks, collectives: Collectives) -> bool:
    """Whether ``folder`` is the universal form of ``origin``, a checkpoint's checksum; each rank verifies its share."""
    good = False
    with contextlib.suppress(DamagedCheckpointError, OSError):
        _, stated = verify(folder, ranks.rank, ranks.world)
        good = stated.get("universal_of") == origin
    return all(collectives.gather(good))


def universal(store: CheckpointStore, checkpoint: Checkpoint, ranks: Ranks, collectives: Collectives) -> Path:
    """The universal form of a checkpoint, made now unless there is a whole one already; a collective.

    Raises:
        StageError: it cannot be made; the checkpoint is untouched.
    """
    final = store.universal_path(checkpoint.step)
    origin = _own_checksum(checkpoint.path)
    if _is_whole(final, origin, ranks, collectives):
        return final
    # In a folder of its own, since DeepSpeed leaves a further file beside the folder that it writes.
    draft = store.folder / f".{final.name}" / final.name
    sizes: dict[str, int] = {}
    problem = ""
    if ranks.is_first:
        shutil.rmtree(draft.parent, ignore_errors=True)
        draft.parent.mkdir()
        try:
            convert(checkpoint.path, draft)
            sizes = {
                path.relative_to(draft).as_posix(): path.stat().st_size
                for path in draft.rglob("*")
                if path.is_file()
            }
        except Exception as error:  # whatever it is: the other ranks must not hang in the broadcast
            problem = f"{type(error).__name__}: {error}"
    problem = collectives.broadcast(problem)
    if problem:
        raise StageError(
            f"The checkpoint of step {checkpoint.step} was saved by other processes than these, and DeepSpeed could "
            f"not convert it ({problem}). Resume with those that saved it: "
            f"{describe_mesh(checkpoint.mesh)}."
        )
    share = split_by_size(collectives.broadcast(sizes), ranks.world)[ranks.rank]
    parts = collectives.gather(checksum(draft, share))
    if ranks.is_first:
        entries = {name: entry for part in parts for name, entry in part.items()}
        seal(draft, checkpoint.step, {"universal_of": origin}, entries)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        fsync_path(store.folder)
        shutil.rmtree(draft.parent)
    collectives.barrier()
    return final


_MOMENTS = ("exp_avg", "exp_avg_sq")


def parameter_folder(folder: Path, name: str) -> Path | None:
    """Where a universal checkpoint keeps a parameter, by the name that the present model has for it, or ``None``.

    Expert weights have other names under expert parallelism; the files keep the names that they were saved under.
    """
    official = official_parameter(name) or name
    places = (folder / "zero" / candidate for candidate in (official, sharded_parameter(official)))
    return next((place for place in places if (place / "fp32.pt").is_file()), None)


def _read(path: Path) -> torch.Tensor:
    """A tensor of a universal checkpoint, memory-mapped: only the pages that are used are read."""
    tensor: torch.Tensor = torch.load(path, mmap=True, weights_only=False)["param"]
    return tensor


def load_universal(engine: Any, folder: Path) -> dict[str, Any]:
    """Fill this rank's partition of weights, moments and step from a universal checkpoint; returns the trainer's state.

    DeepSpeed's own loading pairs optimizer groups by their position and copies their settings, which goes wrong when
    expert parallelism splits groups, and it reads every file whole on every rank.

    Raises:
        StageError: a parameter is not in the checkpoint or has another shape.
    """
    zero = engine.optimizer
    for group, parameters in enumerate(zero.bit16_groups):
        flat = zero.single_partition_of_fp32_groups[group]
        state = zero.optimizer.state[flat]
        for key in _MOMENTS:
            state[key] = torch.zeros_like(flat)
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # no element of it lies in this rank's partition
            name = zero.param_names[parameter]
            source = parameter_folder(folder, name)
            if source is None:
                if official_parameter(name) is None:
                    continue  # w3, a placeholder in DeepSpeed's files, which is zero
                raise StageError(f"The checkpoint {folder.name} has no parameter {name}.")
            part, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
            for key, target in (("fp32", flat), *((key, state[key]) for key in _MOMENTS)):
                full = _own_experts(_read(source / f"{key}.pt"), parameter)
                if full.numel() != parameter.numel():
                    raise StageError(
                        f"{name} has {full.numel()} elements in {folder.name} and {parameter.numel()} in this model."
                    )
                piece = full.reshape(-1).narrow(0, whole.start, whole.numel)
                target.data.narrow(0, part.start, part.numel).copy_(piece)
            state["step"] = torch.load(source / "step.pt", weights_only=False).to(flat.device, copy=True)
    zero.update_lp_params()
    saved = _model_states(folder)
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, saved[counter])
    return trainer_state(folder)


def _model_states(folder: Path) -> dict[str, Any]:
    states: dict[str, Any] = torch.load(
        next(folder.glob("*mp_rank_00_model_states.pt")), mmap=True, weights_only=False
    )
    return states


def trainer_state(folder: Path) -> dict[str, Any]:
    """What the trainer put into a universal checkpoint beside weights and optimizer."""
    state: dict[str, Any] = _model_states(folder)["trainer"]
    return state


def _own_experts(full: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's experts of a stacked tensor; all of it without expert parallelism."""
    sharding = getattr(parameter, "ds_autoep_uc_meta", None)
    if sharding is None:
        return full
    local = sharding["local_experts"]
    return full[local[0] : local[-1] + 1]
