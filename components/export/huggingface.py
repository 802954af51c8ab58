"""The official Hugging Face folder: ``write_folder(checkpoint, tokenizer_folder, target, ...)``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from components.artifacts import StageError
from model import OfficialCheckpoint, SmallThinkerConfig, write_checkpoint
from model.accounting import count_parameters, kv_cache_bytes

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_tokenizer(*folders: Path) -> Path:
    """The first of the folders that holds a tokenizer.

    Raises:
        StageError: none does.
    """
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder
    raise StageError(
        f"No tokenizer.json in {' or '.join(map(str, folders))}; the export needs the tokenizer's files."
    )


def exported_config(config: SmallThinkerConfig, max_position_embeddings: int | None) -> SmallThinkerConfig:
    """The configuration as it is published: official keys only, so without the weights of the training losses."""
    published = SmallThinkerConfig.from_dict(config.to_diff_dict())
    published.load_balance_coef = published.router_z_coef = 0.0
    if max_position_embeddings is not None:
        published.max_position_embeddings = max_position_embeddings
    return published


def write_folder(
    checkpoint: OfficialCheckpoint,
    tokenizer_folder: Path,
    target: Path,
    config: SmallThinkerConfig,
    dtype: str,
    shard_bytes: int,
) -> None:
    """Write weights, configuration, generation settings and tokenizer, one shard in memory at a time."""
    chosen = checkpoint.read("model.norm.weight").dtype if dtype == "same" else _DTYPES[dtype]
    config.dtype = chosen
    target.mkdir(parents=True, exist_ok=True)
    write_checkpoint(target, config, checkpoint.read_entry, chosen, shard_bytes)
    config.save_pretrained(target)
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)
    else:
        settings = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        text = json.dumps({"_from_model_config": True, **settings}, indent=2) + "\n"
        (target / generation.name).write_text(text)
    for name in _TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, target / name)


def model_card(name: str, config: SmallThinkerConfig, metrics: Mapping[str, Mapping[str, float]]) -> str:
    """README of the folder, from the configuration and the parents' headline metrics.

    Args:
        name: the model's name.
        config: the published configuration.
        metrics: headline metrics by stage, from the manifests.
    """
    counts = count_parameters(config)
    assert config.rope_layout is not None and config.sliding_window_layout is not None
    routing = "softmax" if config.moe_primary_router_apply_softmax else "normalised sigmoid"
    experts, active = config.moe_num_primary_experts, config.moe_num_active_primary_experts
    rows = {
        "parameters": f"{counts.total:,} ({counts.active:,} active per token, vocabulary matrices not counted)",
        "layers": f"{config.num_hidden_layers}, width {config.hidden_size}",
        "attention": f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads "
        f"of {config.head_dim}",
        "RoPE": f"{sum(config.rope_layout)} layers, base {float(config.rope_theta):g}; the others have no positions",
        "windows": f"{sum(config.sliding_window_layout)} layers of {config.sliding_window_size} tokens",
        "experts": f"{experts} of {config.moe_ffn_hidden_size} neurons, {active} per token, {routing} weights, "
        "chosen from the layer's raw input",
        "context": f"{config.max_position_embeddings} tokens "
        f"({kv_cache_bytes(config, config.max_position_embeddings):,} bytes of keys and values in 16 bits)",
        "vocabulary": f"{config.vocab_size:,}, output matrix {'tied' if config.tie_word_embeddings else 'untied'}",
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [smallthinker, mixture-of-experts]",
        "---",
        f"# {name}",
        "",
        "A SmallThinker model: a sparse mixture of ReLU-gated experts whose router reads the layer's input, so that a "
        "device can fetch experts while attention runs (arXiv 2507.20984).",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in rows.items()),
    ]
    for stage, values in metrics.items():
        if values:
            lines += ["", f"## {stage}", "", "| metric | value |", "| --- | --- |"]
            lines += [f"| {key} | {value:.6g} |" for key, value in sorted(values.items())]
    return "\n".join(lines) + "\n"
