"""Parameters, KV bytes and FLOPs of a configuration: ``count_parameters(preset("21b")).total``.

FLOPs follow PaLM (arXiv 2204.02311, appendix B); recomputation does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.configuration import SmallThinkerConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    Attributes:
        total: all, a tied output matrix counted once.
        active: read for one token, without the vocabulary matrices (the "A0.6B" and "A3B" of the releases'
            names).
        experts: all experts of all layers.
        vocabulary: one vocabulary matrix.
    """

    total: int
    active: int
    experts: int
    vocabulary: int


def layer_parameters(config: SmallThinkerConfig) -> dict[str, int]:
    """Parameters of one layer by part: attention, one expert, router, norms."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    return {
        "attention": 2 * width * heads + 2 * width * config.num_key_value_heads * config.head_dim,
        "expert": 3 * width * config.moe_ffn_hidden_size,
        "router": width * config.moe_num_primary_experts,
        "norms": 2 * width,
    }


def count_parameters(config: SmallThinkerConfig) -> ParameterCounts:
    """Count from the configuration alone."""
    width, layers, part = config.hidden_size, config.num_hidden_layers, layer_parameters(config)
    shared = layers * (part["attention"] + part["router"] + part["norms"]) + width
    experts = layers * config.moe_num_primary_experts * part["expert"]
    vocabulary = config.vocab_size * width
    return ParameterCounts(
        total=shared + experts + (1 if config.tie_word_embeddings else 2) * vocabulary,
        active=shared + layers * config.moe_num_active_primary_experts * part["expert"],
        experts=experts,
        vocabulary=vocabulary,
    )


def kv_cache_bytes(config: SmallThinkerConfig, tokens: int, value_bytes: int = 2) -> int:
    """Bytes of keys and values after ``tokens`` tokens; a windowed layer keeps at most the window."""
    per_token = 2 * config.num_key_value_heads * config.head_dim * value_bytes
    windowed = sum(config.sliding_window_layout or [])
    kept = min(tokens, config.sliding_window_size)
    return per_token * (windowed * kept + (config.num_hidden_layers - windowed) * tokens)


def mean_keys(config: SmallThinkerConfig, layer: int, context: int) -> float:
    """Keys that a token sees on average in a causal sequence of ``context`` tokens (context/2; less in a window)."""
    windows = config.sliding_window_layout or [0] * config.num_hidden_layers
    window = config.sliding_window_size
    if not windows[layer] or window >= context:
        return context / 2
    return window - window * window / (2 * context)


def training_flops_per_token(config: SmallThinkerConfig, context: int) -> float:
    """Training FLOPs per token at a context length (tokens).

    6 per active weight (forward 2, backward 4), the output matrix included and the embedding look-up not, plus
    attention at 12 * L * N * H * (mean keys in view).
    """
    counts = count_parameters(config)
    heads = config.num_attention_heads * config.head_dim
    attention = sum(
        12.0 * heads * mean_keys(config, layer, context) for layer in range(config.num_hidden_layers)
    )
    return 6.0 * (counts.active + counts.vocabulary) + attention
