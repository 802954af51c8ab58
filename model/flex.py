"""Attention over packed documents without a mask in memory, for GPUs: FlexAttention with block masks.

``blocks = document_blocks(documents_BT, window)`` once per forward and kind of layer, then ``attend(q, k, v, blocks)``.
Blocks of 128 x 128 that the window, the future or another document excludes are never computed. On CPUs
FlexAttention has no backward pass (torch 2.13); there it serves inference and tests.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@cache
def _compiled() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def document_blocks(documents_BT: Tensor, window: int | None) -> BlockMask:
    """Which blocks of keys each block of queries needs: causal, within a document and, if given, within the window.

    Args:
        documents_BT: document number per token; equal numbers see each other (padding is a document too).
        window: tokens in view, the token itself included; ``None``: all.
    """
    batch, tokens = documents_BT.shape

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (documents_BT[b, query] == documents_BT[b, key])
        return seen if window is None else seen & (query - key < window)

    device = documents_BT.device
    return create_block_mask(
        allowed, batch, None, tokens, tokens, device=device, _compile=device.type == "cuda"
    )


def attend(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, blocks: BlockMask) -> Tensor:
    """``[B, N, T, H]`` from queries of N heads and keys and values of G heads, scale ``H ** -0.5``."""
    function = _compiled() if q_BNTH.is_cuda else cast(Callable[..., Tensor], flex_attention)
    grouped = q_BNTH.shape[1] != k_BGTH.shape[1]
    out_BNTH = function(q_BNTH, k_BGTH, v_BGTH, block_mask=blocks, enable_gqa=grouped)
    return out_BNTH
