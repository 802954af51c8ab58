"""Linear merging by MergeKit: ``merge({"sft": (folder, 0.8), "stage3": (folder, 0.2)}, out)``.

w = sum_i a_i w_i / sum_i a_i, tensor by tensor in float32, stored in the checkpoints' own type (MergeKit 0.1.5, method
``linear`` with ``normalize``). MergeKit reads tensors lazily and writes shards as they fill, so memory is bounded by a
shard. It knows no SmallThinker and would infer names from our in-memory (stacked) layout, so we hand it the official
tensor names; with them nothing is downloaded or guessed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.architecture.base import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
from mergekit.common import ModelPath, ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers import AutoConfig

from components.artifacts import StageError
from components.merging.compatibility import (
    EMBEDDING_NAME,
    HEAD_NAME,
    INDEX_NAME,
    check_compatible,
    read_config,
    read_shapes,
    weight_files,
)
from model import SmallThinkerConfig

_ARCHITECTURE = "SmallThinkerForCausalLM"
_LAYER_NAMES = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "block_sparse_moe.primary_router.weight",
)


class SmallThinkerTensors(ModuleArchitecture):  # type: ignore[misc]  # MergeKit is untyped
    """The official tensor names of a SmallThinker, for MergeKit.

    Args:
        with_head: write ``lm_head.weight``. In a tied model it is a copy of the embedding, which files may carry
            (the released 4B does) or not; a file without it is read as if its embedding were there twice.
    """

    def __init__(self, with_head: bool) -> None:
        self.with_head = with_head

    def pre_weights(self, config: Any) -> list[WeightInfo]:
        """The embedding."""
        return [WeightInfo(name=EMBEDDING_NAME, vocabulary_axis=0)]

    def layer_weights(self, index: int, config: Any) -> list[WeightInfo]:
        """One layer: attention, norms, router and every expert's three matrices."""
        names = list(_LAYER_NAMES)
        for expert in range(config.moe_num_primary_experts):
            names += [f"block_sparse_moe.experts.{expert}.{part}.weight" for part in ("gate", "up", "down")]
        return [WeightInfo(name=f"model.layers.{index}.{name}") for name in names]

    def post_weights(self, config: Any) -> list[WeightInfo]:
        """The final norm, and the output matrix if it is wanted."""
        weights = [WeightInfo(name="model.norm.weight")]
        if self.with_head:
            aliases = (EMBEDDING_NAME,) if config.tie_word_embeddings else None
            weights.append(WeightInfo(name=HEAD_NAME, vocabulary_axis=0, aliases=aliases))
        return weights


def tensor_names(config: SmallThinkerConfig, with_head: bool) -> set[str]:
    """Names of all tensors that are merged."""
    return {weight.name for weight in SmallThinkerTensors(with_head).all_weights(config)}


def merge(
    parts: Mapping[str, tuple[Path, float]],
    out: Path,
    *,
    allow_rope_change: bool = False,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the weighted mean of checkpoints to ``out``: weights and ``config.json`` (that of the heaviest part).

    A part of weight 0 is not read. With one part left the result is that checkpoint, bit by bit.

    Args:
        parts: folder and weight by name; weights are divided by their sum.
        out: a folder that does not exist or is empty.
        allow_rope_change: accept different ``rope_theta``.
        shard_bytes: largest file.

    Raises:
        StageError: the checkpoints do not fit each other, or no weight is positive.
    """
    # By name, so that the result does not depend on the caller's order (float32 sums do).
    used = {name: part for name, part in sorted(parts.items()) if part[1] > 0.0}
    if not used or any(weight < 0.0 for _, weight in parts.values()):
        raise StageError(
            f"the merging weights {[w for _, w in parts.values()]} need to be >= 0, one of them above 0."
        )
    check_compatible({name: folder for name, (folder, _) in used.items()}, allow_rope_change)
    heaviest = max(used, key=lambda name: used[name][1])
    folder = used[heaviest][0]
    if read_config(folder).get("architectures") not in ([_ARCHITECTURE], None):
        raise StageError(
            f"{folder} holds {read_config(folder)['architectures']}; only {_ARCHITECTURE} is merged here."
        )
    out.mkdir(parents=True, exist_ok=True)
    if len(used) == 1:
        for path in [*weight_files(folder), folder / INDEX_NAME]:
            if path.is_file():
                shutil.copyfile(path, out / path.name)
    else:
        _run_mergekit(list(used.values()), folder, out, shard_bytes)
    shutil.copyfile(folder / "config.json", out / "config.json")


def _run_mergekit(parts: list[tuple[Path, float]], config_folder: Path, out: Path, shard_bytes: int) -> None:
    with_head = any(HEAD_NAME in read_shapes(folder) for folder, _ in parts)
    logging.getLogger("mergekit").setLevel(logging.WARNING)
    references = [ModelReference(model=ModelPath(path=str(folder))) for folder, _ in parts]
    configuration = MergeConfiguration(
        merge_method="linear",
        models=[
            InputModelDefinition(model=reference, parameters={"weight": weight})
            for reference, (_, weight) in zip(references, parts, strict=True)
        ],
        parameters={"normalize": True},
    )
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, out_shard_size=shard_bytes, device="cpu"
    )
    architecture = ModelArchitecture(
        modules={"default": ModuleDefinition(architecture=SmallThinkerTensors(with_head))},
        architectures=[_ARCHITECTURE],
        model_type="smallthinker",
    )
    LoaderCache().setup(options=options)
    planner = MergePlanner(
        configuration,
        architecture,
        options=options,
        out_model_config=AutoConfig.from_pretrained(config_folder),
    )
    try:
        for _ in Executor(targets=planner.plan_to_disk(out_path=str(out)), math_device="cpu").run(quiet=True):
            pass
    finally:
        LoaderCache().flush_all()
        LoaderCache().loaders.clear()  # a path may hold other weights next time
