"""Floating-point operations of training, by the convention of PaLM (arXiv 2204.02311, appendix B).

``training_flops_per_token(config, 4096)``: 6 per active weight (forward 2, backward 4) with the output matrix but not
the embedding look-up, plus attention at 12 * L * N * H * (mean keys in view). Recomputation does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model import SmallThinkerConfig


def layer_parameters(config: SmallThinkerConfig) -> dict[str, int]:
    """Parameters of one layer by part: attention, one expert, router, norms."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    return {
        "attention": 2 * width * heads + 2 * width * config.num_key_value_heads * config.head_dim,
        "expert": 3 * width * config.moe_ffn_hidden_size,
        "router": width * config.moe_num_primary_experts,
        "norms": 2 * width,
    }


def active_parameters(config: SmallThinkerConfig) -> int:
    """Parameters that act on one token, with neither vocabulary matrix."""
    part = layer_parameters(config)
    layer = part["attention"] + part["router"] + part["norms"]
    layer += config.moe_num_active_primary_experts * part["expert"]
    return config.num_hidden_layers * layer + config.hidden_size


def mean_keys(config: SmallThinkerConfig, layer: int, context: int) -> float:
    """Keys that a token sees on average in a causal sequence of ``context`` tokens (context/2; less in a window)."""
    windows = config.sliding_window_layout or [0] * config.num_hidden_layers
    window = config.sliding_window_size
    if not windows[layer] or window >= context:
        return context / 2
    return window - window * window / (2 * context)


def training_flops_per_token(config: SmallThinkerConfig, context: int) -> float:
    """Training FLOPs per token at a context length (tokens)."""
    heads = config.num_attention_heads * config.head_dim
    attention = sum(
        12.0 * heads * mean_keys(config, layer, context) for layer in range(config.num_hidden_layers)
    )
    return 6.0 * (active_parameters(config) + config.vocab_size * config.hidden_size) + attention
