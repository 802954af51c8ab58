"""Whether checkpoints can be merged: ``check_compatible({"sft": folder, "stage3": folder}, allow_rope_change=True)``.

Only JSON and safetensors headers are read, and a tied model's embedding with its copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from components.artifacts import StageError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Keys that say nothing about what the weights compute.
_FREE_KEYS = frozenset(
    {
        "_name_or_path",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "load_balance_coef",
        "max_position_embeddings",
        "model_name",
        "output_router_logits",
        "pad_token_id",
        "router_z_coef",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_ROPE_KEY = "rope_theta"
EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``.

    Raises:
        StageError: it is missing or not JSON.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise StageError(f"{folder} does not hold a checkpoint: config.json is missing.") from error
    except ValueError as error:
        raise StageError(f"{folder / 'config.json'} is not JSON: {error}.") from error
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        StageError: there are none, or one that the index names is missing.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS_NAME]
    for path in files:
        if not path.is_file():
            raise StageError(f"{folder} does not hold a whole checkpoint: {path.name} is missing.")
    return files


def read_shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor's dtype and shape.

    Raises:
        StageError: a file is torn.
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    part = file.get_slice(name)
                    shapes[name] = (part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise StageError(f"{path} is not a whole safetensors file: {error}.") from error
    return shapes


def check_compatible(folders: Mapping[str, Path], allow_rope_change: bool) -> None:
    """Check that checkpoints agree in every architectural key, tensor name, shape and type.

    A tied model's copy of its embedding (``lm_head.weight``) may be there or not; where it is, it must be a copy.

    Raises:
        StageError: they do not; names the key or the tensor and both checkpoints.
    """
    (first, first_folder), *others = folders.items()
    config, shapes = read_config(first_folder), _without_tied_head(first_folder)
    for name, folder in others:
        other = read_config(folder)
        for key in sorted((config.keys() | other.keys()) - _FREE_KEYS):
            if key == _ROPE_KEY and allow_rope_change:
                continue
            if config.get(key) != other.get(key):
                raise StageError(
                    f"{first} and {name} cannot be merged: {key} is {config.get(key)!r} in {first} and "
                    f"{other.get(key)!r} in {name}."
                    + (" Set merge.allow_rope_change to merge them anyway." if key == _ROPE_KEY else "")
                )
        other_shapes = _without_tied_head(folder)
        for tensor in sorted(shapes.keys() | other_shapes.keys()):
            if tensor not in other_shapes or tensor not in shapes:
                there, missing = (first, name) if tensor in shapes else (name, first)
                raise StageError(
                    f"{first} and {name} cannot be merged: tensor {tensor} is in {there} and not in {missing}."
                )
            if shapes[tensor] != other_shapes[tensor]:
                raise StageError(
                    f"{first} and {name} cannot be merged: tensor {tensor} is {_describe(shapes[tensor])} in {first} "
                    f"and {_describe(other_shapes[tensor])} in {name}."
                )


def _describe(entry: tuple[str, tuple[int, ...]]) -> str:
    return f"{entry[0]} {list(entry[1])}"


def _without_tied_head(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes = read_shapes(folder)
    if read_config(folder).get("tie_word_embeddings") and HEAD_NAME in shapes:
        if not torch.equal(_read_tensor(folder, HEAD_NAME), _read_tensor(folder, EMBEDDING_NAME)):
            raise StageError(
                f"{folder} says that its embeddings are tied, and its tensors {HEAD_NAME} and {EMBEDDING_NAME} "
                "differ; loaders would use the embedding. Save it again through the model, then merge."
            )
        del shapes[HEAD_NAME]
    return shapes


def _read_tensor(folder: Path, name: str) -> torch.Tensor:
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  # not a dict
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    raise StageError(f"{folder} has no tensor {name}.")
