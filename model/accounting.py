"""Parameters, KV bytes and FLOPs of a configuration: ``count_parameters(preset("21b")).total``."""

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
        vocabulary: one vocabulary matrix.
    """

    total: int
    active: int
    vocabulary: int


def count_parameters(config: SmallThinkerConfig) -> ParameterCounts:
    """Count from the configuration alone."""
    width, layers = config.hidden_size, config.num_hidden_layers
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = 2 * width * heads * head_dim + 2 * width * kv_heads * head_dim
    expert = 3 * width * config.moe_ffn_hidden_size
    shared = attention + config.moe_num_primary_experts * width + 2 * width
    vocabulary = config.vocab_size * width
    matrices = 1 if config.tie_word_embeddings else 2
    return ParameterCounts(
        total=layers * (shared + config.moe_num_primary_experts * expert) + width + matrices * vocabulary,
        active=layers * (shared + config.moe_num_active_primary_experts * expert) + width,
        vocabulary=vocabulary,
    )


def kv_cache_bytes(config: SmallThinkerConfig, tokens: int, value_bytes: int = 2) -> int:
    """Bytes of keys and values after ``tokens`` tokens; a windowed layer keeps at most the window."""
    per_token = 2 * config.num_key_value_heads * config.head_dim * value_bytes
    windowed = sum(config.sliding_window_layout or [])
    kept = min(tokens, config.sliding_window_size)
    return per_token * (windowed * kept + (config.num_hidden_layers - windowed) * tokens)


def training_flops_per_token(config: SmallThinkerConfig, context: int) -> float:
    """FLOPs of forward and backward per token: 6 per active weight (output matrix included), and attention.

    A causal token attends to half the context on average, or, in a windowed layer, to the mean of
    ``min(position + 1, window)``.
    """
    counts = count_parameters(config)
    window = min(config.sliding_window_size, context)
    mean_global = context / 2
    mean_windowed = window - window**2 / (2 * context)
    windowed = sum(config.sliding_window_layout or [])
    keys = windowed * mean_windowed + (config.num_hidden_layers - windowed) * mean_global
    attention = 12 * config.num_attention_heads * config.head_dim * keys
    return 6 * (counts.active + counts.vocabulary) + attention
