"""Attention over packed documents without a mask in memory, for GPUs: FlexAttention with block masks.

``blocks = document_blocks(documents_BT, window)`` once per forward and kind of layer, then ``attend(q, k, v, blocks)``.
Blocks of 128 x 128 that the window, the future or another document excludes are never computed. On CPUs
FlexAttention has no backward pass (torch 2.13); there it serves inference and tests.

Legend: B batch, T tokens, J blocks of queries, K blocks of keys.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.compiling import compiled, takes_kernels

_BLOCK = 128

_fused_attention = compiled(flex_attention)


def _ordered(wanted_BJK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries wants, and all of them, wanted ones first: int32."""
    counts_B1J = wanted_BJK.sum(dim=-1, dtype=torch.int32)[:, None]
    order_B1JK = wanted_BJK.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, None]
    return counts_B1J, order_B1JK.to(torch.int32)


def document_blocks(documents_BT: Tensor, window: int | None) -> BlockMask:
    """Which blocks of keys each block of queries needs: causal, within a document and, if given, within the window.

    Decided from every block's smallest and greatest document, so that nothing of size T x T exists, compiled or not
    (torch's ``create_block_mask`` looks at every pair). Exact where numbers do not fall, as in packed rows; else a
    block may be computed that is all masked.

    Args:
        documents_BT: document number per token; equal numbers see each other (padding is a document too).
        window: tokens in view, the token itself included; ``None``: all.
    """
    tokens = documents_BT.shape[1]

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (documents_BT[b, query] == documents_BT[b, key])
        return seen if window is None else seen & (query - key < window)

    blocks = -(-tokens // _BLOCK)
    missing = blocks * _BLOCK - tokens
    padded_BT = (
        documents_BT
        if not missing
        else torch.cat((documents_BT, documents_BT[:, -1:].expand(-1, missing)), dim=1)
    )
    low_BK, high_BK = padded_BT.unflatten(1, (blocks, _BLOCK)).aminmax(dim=-1)
    first_K = torch.arange(blocks, device=documents_BT.device) * _BLOCK
    last_K = first_K + (_BLOCK - 1)
    low_BJ1, high_BJ1, first_J1, last_J1 = (
        low_BK[..., None],
        high_BK[..., None],
        first_K[:, None],
        last_K[:, None],
    )
    some_JK, every_JK = first_K <= last_J1, last_K <= first_J1
    if window is not None:
        some_JK = some_JK & (first_J1 - last_K < window)
        every_JK = every_JK & (last_J1 - first_K < window)
    if missing:  # the last block is not whole
        every_JK = every_JK & (last_J1 < tokens)
    some_BJK = some_JK & (low_BJ1 <= high_BK[:, None]) & (low_BK[:, None] <= high_BJ1)
    one_document_BJK = (low_BJ1 == high_BK[:, None]) & (low_BK[:, None] == high_BJ1)
    every_BJK = every_JK & one_document_BJK
    return BlockMask.from_kv_blocks(
        *_ordered(some_BJK & ~every_BJK),
        *_ordered(every_BJK),
        BLOCK_SIZE=_BLOCK,
        mask_mod=allowed,
        seq_lengths=(tokens, tokens),
    )


def attend(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, blocks: BlockMask) -> Tensor:
    """``[B, N, T, H]`` from queries of N heads and keys and values of G heads, scale ``H ** -0.5``."""
    function = cast(Callable[..., Tensor], _fused_attention if takes_kernels(q_BNTH) else flex_attention)
    grouped = q_BNTH.shape[1] != k_BGTH.shape[1]
    out_BNTH = function(q_BNTH, k_BGTH, v_BGTH, block_mask=blocks, enable_gqa=grouped)
    return out_BNTH
