"""Small random models for tests: ``tiny(windowed=True)``."""

from __future__ import annotations

from typing import Any

import torch

from model import SmallThinkerConfig, SmallThinkerForCausalLM


def tiny_config(**overrides: Any) -> SmallThinkerConfig:
    """Four layers, width 32, 8 experts, window 8; ``overrides`` by official key."""
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_ffn_hidden_size": 16,
        "moe_num_primary_experts": 8,
        "moe_num_active_primary_experts": 3,
        "moe_primary_router_apply_softmax": True,
        "rope_layout": [0, 1, 1, 1],
        "sliding_window_layout": [0, 1, 1, 1],
        "sliding_window_size": 8,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "max_position_embeddings": 256,
    }
    return SmallThinkerConfig(**{**values, **overrides})


def tiny(seed: int = 0, **overrides: Any) -> SmallThinkerForCausalLM:
    """A random model in eval mode and float32."""
    torch.manual_seed(seed)
    return SmallThinkerForCausalLM(tiny_config(**overrides)).eval()


def token_ids(batch: int, tokens: int, seed: int = 1, vocab: int = 97) -> torch.Tensor:
    """Random ids ``[batch, tokens]``."""
    return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))
