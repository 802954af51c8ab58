"""Attention masks: causal, windowed, padded and packed, built once per forward and shared by the layers.

Positions here are *slots* of the sequence (0 is the first slot of the batch's rows, padding included), not RoPE
positions, so that left padding and windows agree with transformers' caches.

Legend: B batch, Q query tokens, S key tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.flex import document_blocks


def document_ids(tokens_BT: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Number the packed documents of every row; an ``eos_id`` begins a new one. ``[B, T]`` int64."""
    return (tokens_BT == eos_id).long().cumsum(dim=1)


@dataclass(frozen=True)
class LayerMask:
    """What one kind of layer (global or windowed) hands to scaled_dot_product_attention.

    Attributes:
        allowed: ``[B or 1, 1, Q, S]`` bool, True where attention is allowed; ``None``: see ``is_causal``.
        is_causal: the square causal mask, by the kernel's own means.
        blocks: FlexAttention's block mask, to be used instead of the others; GPUs in training.
    """

    allowed: Tensor | None
    is_causal: bool
    blocks: BlockMask | None = None
    _memo: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def additive(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """The mask as ``[B or 1, 1, Q, S]`` of 0 and -inf in the dtype of ``like``."""
        if "additive" not in self._memo:
            allowed = self.allowed
            if allowed is None:
                allowed = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
                if self.is_causal:
                    allowed = allowed.tril()
                allowed = allowed[None, None]
            zero = torch.zeros((), dtype=like.dtype, device=like.device)
            self._memo["additive"] = torch.where(allowed, zero, float("-inf"))
        return self._memo["additive"]


@lru_cache(maxsize=16)
def _square_window(tokens: int, window: int, device: torch.device) -> Tensor:
    """``[1, 1, T, T]``: the token itself and ``window - 1`` tokens before it."""
    slots_T = torch.arange(tokens, device=device)
    distance_TT = slots_T[:, None] - slots_T[None, :]
    return ((distance_TT >= 0) & (distance_TT < window))[None, None]


def build_layer_mask(
    *,
    queries: int,
    keys: int,
    key_offset: int,
    past_tokens: int | Tensor,
    window: int | None,
    padding_BS: Tensor | None,
    documents_BT: Tensor | None,
    device: torch.device,
    use_blocks: bool = False,
) -> LayerMask:
    """Mask of one kind of layer.

    Args:
        queries: Q, the tokens of this forward.
        keys: S, the keys that the layer's attention sees.
        key_offset: slot of the first key (above 0 once a window has dropped keys).
        past_tokens: tokens before this forward's first query.
        window: W for a windowed layer, ``None`` for a global one.
        padding_BS: ``[B, >= past + Q]`` True for real tokens, or ``None`` when every token is real.
        documents_BT: ``[B, Q]`` document number per token, only without a past; negative means padding.
        device: where the mask is needed.
        use_blocks: give documents as FlexAttention's block mask.
    """
    if use_blocks and documents_BT is not None:
        return LayerMask(None, is_causal=False, blocks=document_blocks(documents_BT, window))
    plain = padding_BS is None and documents_BT is None
    fresh = isinstance(past_tokens, int) and past_tokens == 0 and keys == queries
    is_limiting = window is not None and window < keys
    if plain and fresh:
        if not is_limiting:
            return LayerMask(None, is_causal=queries > 1)
        assert window is not None
        if torch.compiler.is_compiling():
            return LayerMask(_square_window.__wrapped__(queries, window, device), is_causal=False)
        return LayerMask(_square_window(queries, window, device), is_causal=False)
    if plain and queries == 1 and not is_limiting and isinstance(past_tokens, int):
        return LayerMask(None, is_causal=False)  # decoding: every cached key is visible

    query_slots_Q = torch.arange(queries, device=device) + past_tokens
    key_slots_S = torch.arange(keys, device=device) + key_offset
    distance_QS = query_slots_Q[:, None] - key_slots_S[None, :]
    allowed_QS = distance_QS >= 0
    if window is not None:
        allowed_QS = allowed_QS & (distance_QS < window)
    allowed = allowed_QS[None]
    if padding_BS is not None:
        # A static cache announces more keys than tokens exist yet; those are in the future, hence masked anyway.
        missing = key_offset + keys - padding_BS.shape[1]
        if missing > 0:
            padding_BS = torch.nn.functional.pad(padding_BS, (0, missing), value=False)
        allowed = allowed & padding_BS[:, None, key_offset : key_offset + keys]
    if documents_BT is not None:
        allowed = allowed & (documents_BT[:, :, None] == documents_BT[:, None, :])
    # A padding query would see nothing, and softmax over nothing is undefined: let it see itself.
    allowed = allowed | (distance_QS == 0)[None]
    return LayerMask(allowed[:, None], is_causal=False)
