"""Official Hugging Face folders of random weights, written without the code under test."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

VOCAB = 520
CONFIG: dict[str, Any] = {
    "architectures": ["SmallThinkerForCausalLM"],
    "model_name": "toy",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_ffn_hidden_size": 32,
    "moe_num_primary_experts": 4,
    "moe_num_active_primary_experts": 2,
    "moe_primary_router_apply_softmax": True,
    "rope_layout": [0, 1, 1, 1],
    "sliding_window_layout": [0, 1, 1, 1],
    "sliding_window_size": 24,
    "rope_theta": "1.5e6",
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "eos_token_id": 1,
}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The official tensors, by name (section 2 of the specification)."""
    d, f, h = config["hidden_size"], config["moe_ffn_hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        result |= {
            f"{prefix}input_layernorm.weight": (d,),
            f"{prefix}self_attn.q_proj.weight": (query, d),
            f"{prefix}self_attn.k_proj.weight": (key, d),
            f"{prefix}self_attn.v_proj.weight": (key, d),
            f"{prefix}self_attn.o_proj.weight": (d, query),
            f"{prefix}post_attention_layernorm.weight": (d,),
            f"{prefix}block_sparse_moe.primary_router.weight": (config["moe_num_primary_experts"], d),
        }
        for expert in range(config["moe_num_primary_experts"]):
            for part, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                result[f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight"] = shape
    return result | {"model.norm.weight": (d,), "lm_head.weight": (config["vocab_size"], d)}


def stored(values: NDArray[np.float32], dtype: str) -> bytes:
    """``values`` as bytes of ``dtype``; bfloat16 by cutting."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def random_tensors(config: Mapping[str, Any], dtype: str = "BF16", seed: int = 0) -> dict[str, Any]:
    """name -> (dtype, shape, bytes)."""
    random = np.random.default_rng(seed)
    result = {}
    for name, shape in shapes(config).items():
        size = math.prod(shape)
        values = random.standard_normal(min(size, 1 << 18), np.float32) * np.float32(0.2)
        values += np.float32(len(shape) == 1)
        data = stored(values, dtype)
        whole = size * ITEM_BYTES[dtype]  # large matrices repeat themselves: making them should not take long
        result[name] = dtype, shape, (data * -(-whole // len(data)))[:whole]
    return result


def safetensors_bytes(tensors: Mapping[str, Any]) -> bytes:
    """A file of name -> (dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end := end + len(data)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def write_folder(
    folder: Path, config: Mapping[str, Any] = CONFIG, shards: int = 1, dtype: str = "BF16", seed: int = 0
) -> Path:
    """A folder with its weights in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    tensors = random_tensors(config, dtype, seed)
    names = list(tensors)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in chosen}))
        places |= dict.fromkeys(chosen, file)
    index = {
        "metadata": {"total_size": sum(len(data) for *_, data in tensors.values())},
        "weight_map": places,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(
    folder: Path, tokenizer: tokenizers.Tokenizer, plain: bool = False, **settings: Any
) -> None:
    """tokenizer.json, or (``plain``) vocab.json and merges.txt; tokenizer_config.json with ``settings``."""
    contents = json.loads(tokenizer.to_str())
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", **settings}
    if plain:
        (folder / "vocab.json").write_text(json.dumps(contents["model"]["vocab"]))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in contents["model"]["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        config["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in contents["added_tokens"]
        }
    else:
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
