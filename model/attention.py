"""Grouped-query attention with per-layer RoPE or NoPE and per-layer window, and the norm before it.

Source: arXiv 2507.20984 section 2; the released code for the exact order of roundings.
Legend: B batch, T tokens, D model, N query heads, G key/value heads, H head dim, S key tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from model.configuration import SmallThinkerConfig
from model.flex import attend
from model.masks import LayerMask


class RMSNorm(nn.Module):
    """``weight * cast(x32 * rsqrt(mean(x32^2) + eps))``: the cast to the model's dtype comes before the product."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]`` in x's dtype."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normed = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE in the half-rotation (NeoX) layout: dimension i pairs with i + H/2.

    The frequencies ``theta^(-2j/H)`` are computed in float32 for each call rather than kept in a buffer: a buffer would
    be rounded by ``model.to(bfloat16)``, which moves logits visibly.
    """

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions ``[B or 1, T]`` -> cos and sin, each ``[B or 1, 1, T, H]`` in ``dtype``."""
        head_dim = self.config.head_dim
        exponent = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
        inverse_frequency = 1.0 / (float(self.config.rope_theta) ** exponent)
        angle_BTh = positions_BT[..., None].float() * inverse_frequency
        angle_BTH = torch.cat((angle_BTh, angle_BTh), dim=-1)[:, None]
        return angle_BTH.cos().to(dtype), angle_BTH.sin().to(dtype)


def apply_rope(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin``; shapes ``[B, N, T, H]`` and ``[B or 1, 1, T, H]``."""
    half = x_BNTH.shape[-1] // 2
    rotated = torch.cat((-x_BNTH[..., half:], x_BNTH[..., :half]), dim=-1)
    # Under autocast the angles are float32; the product must not promote q and k to that.
    return x_BNTH * cos.to(x_BNTH.dtype) + rotated * sin.to(x_BNTH.dtype)


def _prefers_plain_products(q_BNTH: Tensor, k_BGSH: Tensor) -> bool:
    """Training in bfloat16 on a CPU at short lengths, where the fused kernel's backward is 2.4 times slower."""
    return (
        q_BNTH.device.type == "cpu"
        and q_BNTH.dtype == torch.bfloat16
        and q_BNTH.requires_grad
        and k_BGSH.shape[2] <= 1024
    )


def _attend_by_products(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: LayerMask) -> Tensor:
    """Attention as two batched matrix products and a softmax with float32 sums."""
    batch, heads, queries, head_dim = q_BNTH.shape
    groups, keys = k_BGSH.shape[1], k_BGSH.shape[2]
    bias = mask.additive(queries, keys, q_BNTH)
    q = q_BNTH.reshape(batch * groups, heads // groups * queries, head_dim)
    k, v = k_BGSH.reshape(batch * groups, keys, head_dim), v_BGSH.reshape(batch * groups, keys, head_dim)
    scores = torch.bmm(q * head_dim**-0.5, k.transpose(1, 2)).view(batch, heads, queries, keys) + bias
    weights = torch.softmax(scores, dim=-1).view(batch * groups, heads // groups * queries, keys)
    return torch.bmm(weights, v).view(batch, heads, queries, head_dim)


class Attention(nn.Module):
    """One layer's attention: no bias, no query/key norm, score scale ``H ** -0.5``."""

    def __init__(self, config: SmallThinkerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        assert config.rope_layout is not None and config.sliding_window_layout is not None
        self.uses_rope = bool(config.rope_layout[layer])
        self.is_windowed = bool(config.sliding_window_layout[layer])
        width, query, key = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, query, bias=False)
        self.k_proj = nn.Linear(width, key, bias=False)
        self.v_proj = nn.Linear(width, key, bias=False)
        self.o_proj = nn.Linear(query, width, bias=False)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: LayerMask, cache: Cache | None
    ) -> Tensor:
        """``[B, T, D] -> [B, T, D]``; ``cache`` is updated in place."""
        batch, tokens, _ = x_BTD.shape
        q_BNTH = self.q_proj(x_BTD).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        k_BGTH = self.k_proj(x_BTD).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        v_BGTH = self.v_proj(x_BTD).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.uses_rope:
            q_BNTH = apply_rope(q_BNTH, cos, sin)
            k_BGTH = apply_rope(k_BGTH, cos, sin)
        k_BGSH, v_BGSH = k_BGTH, v_BGTH
        if cache is not None:
            k_BGSH, v_BGSH = cache.update(k_BGTH, v_BGTH, self.layer)
        if mask.blocks is not None:
            out_BNTH = attend(q_BNTH, k_BGSH, v_BGSH, mask.blocks)
        elif _prefers_plain_products(q_BNTH, k_BGSH):
            out_BNTH = _attend_by_products(q_BNTH, k_BGSH, v_BGSH, mask)
        else:
            out_BNTH = F.scaled_dot_product_attention(
                q_BNTH,
                k_BGSH,
                v_BGSH,
                attn_mask=mask.allowed,
                is_causal=mask.is_causal,
                enable_gqa=self.heads != self.kv_heads,
            )
        out_BTD: Tensor = self.o_proj(out_BNTH.transpose(1, 2).reshape(batch, tokens, -1))
        return out_BTD
