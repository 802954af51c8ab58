"""Named sizes: ``preset("nano")``, ``preset("4b")``, ``preset("21b")``, ``preset("4b-hybrid")``."""

# mypy: allow-untyped-calls
from __future__ import annotations

import dataclasses
from typing import Any

from model.configuration import ConfigError, SmallThinkerConfig

_SHARED: dict[str, Any] = {"load_balance_coef": 0.008, "router_z_coef": 1e-3}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": [151643, 151645],
    "tokenizer_class": "Qwen2Tokenizer",
    "dtype": "bfloat16",
    "sliding_window_size": 4096,
    "rope_theta": 1.5e6,
    "head_dim": 128,
    "moe_ffn_hidden_size": 768,
}
_4B: dict[str, Any] = {
    **_QWEN,
    "model_name": "smallthinker_4b_instruct",
    "hidden_size": 1536,
    "num_hidden_layers": 32,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "moe_num_primary_experts": 32,
    "moe_num_active_primary_experts": 4,
    "moe_primary_router_apply_softmax": False,
    "rope_layout": [1] * 32,
    "sliding_window_layout": [0] * 32,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_cache": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "model_name": "smallthinker_nano",
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_ffn_hidden_size": 128,
        "moe_num_primary_experts": 8,
        "moe_num_active_primary_experts": 2,
        "moe_primary_router_apply_softmax": True,
        "rope_layout": [0, 1, 1, 1],
        "sliding_window_layout": [0, 1, 1, 1],
        "sliding_window_size": 256,
        "rope_theta": 1e5,
        "initializer_range": 0.05,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "4b": _4B,
    # The paper (arXiv 2507.20984) describes NoPE-global : RoPE-window = 1:3 for both sizes; the released 4B differs.
    "4b-hybrid": {
        **_4B,
        "model_name": "smallthinker_4b_hybrid",
        "rope_layout": [0, 1, 1, 1] * 8,
        "sliding_window_layout": [0, 1, 1, 1] * 8,
    },
    "21b": {
        **_QWEN,
        "model_name": "smallthinker_21b_instruct",
        "hidden_size": 2560,
        "num_hidden_layers": 52,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "moe_num_primary_experts": 64,
        "moe_num_active_primary_experts": 6,
        "moe_primary_router_apply_softmax": True,
        "rope_layout": [0, 1, 1, 1] * 13,
        "sliding_window_layout": [0, 1, 1, 1] * 13,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
    },
}


def preset(name: str, **overrides: Any) -> SmallThinkerConfig:
    """The configuration of a named size, with ``overrides`` (official key names) replacing single values.

    Raises:
        ConfigError: the name is unknown, an override's key does not exist, or a value is impossible.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    known = {field.name for field in dataclasses.fields(SmallThinkerConfig)} | set(
        SmallThinkerConfig.attribute_map
    )
    for key in overrides:
        if key not in known and key != "torch_dtype":
            raise ConfigError(
                f"{key!r} is not a configuration key; the keys are those of SmallThinkerConfig."
            )
    return SmallThinkerConfig(**{**_SHARED, **PRESETS[name], **overrides})
