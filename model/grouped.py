"""The experts on GPUs around their grouped products: ``y_TD, active_R = grouped_experts(m_TD, …)``.

Rows sorted by expert go through two ``grouped_mm``; what lies before, between and after is one pass over memory each,
forward and backward, compiled on GPUs. Rows are gathered in both directions and never added by index, so that sums are
made in float32, in a fixed order: ``index_add_`` on GPUs uses atomics, in no fixed order and in the tensor's dtype.

Legend: T tokens, D model, E experts, F expert hidden, C = 2F (gate above up), K top-k, R = T * K rows by expert.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.compiling import compiled, takes_kernels


def _sum_rows(g_RD: Tensor, rows_TK: Tensor) -> Tensor:
    return g_RD[rows_TK].float().sum(dim=1).to(g_RD.dtype)


def _weighted_sum(y_RD: Tensor, weights_TK: Tensor, rows_TK: Tensor) -> Tensor:
    return (y_RD[rows_TK].float() * weights_TK[..., None].float()).sum(dim=1).to(y_RD.dtype)


def _weighted_rows(g_TD: Tensor, weights_TK: Tensor, order_R: Tensor) -> Tensor:
    tokens_R = torch.div(order_R, weights_TK.shape[1], rounding_mode="floor")
    return (g_TD[tokens_R].float() * weights_TK.reshape(-1)[order_R, None].float()).to(g_TD.dtype)


def _row_products(g_TD: Tensor, y_RD: Tensor, rows_TK: Tensor) -> Tensor:
    return (y_RD[rows_TK].float() * g_TD[:, None].float()).sum(dim=-1)


def _gate(h_RC: Tensor) -> tuple[Tensor, Tensor]:
    gate_RF, up_RF = h_RC.chunk(2, dim=-1)
    return F.relu(gate_RF) * up_RF, (gate_RF > 0).sum(dim=-1)


def _gate_backward(ga_RF: Tensor, h_RC: Tensor) -> Tensor:
    gate_RF, up_RF = h_RC.chunk(2, dim=-1)
    return torch.cat((torch.where(gate_RF > 0, ga_RF * up_RF, 0.0), ga_RF * F.relu(gate_RF)), dim=-1)


# Compiled for the batch's size first, once more for any size when another comes.
_KERNELS = {
    function: compiled(function, varying=True)
    for function in (_sum_rows, _weighted_sum, _weighted_rows, _row_products, _gate, _gate_backward)
}


def _run(function: Any, *tensors: Tensor) -> Any:
    return (_KERNELS[function] if takes_kernels(tensors[0]) else function)(*tensors)


class _Dispatch(torch.autograd.Function):
    """Tokens' rows in the order of experts; a token's gradient is the sum over its K rows."""

    @staticmethod
    def forward(ctx: Any, m_TD: Tensor, order_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK)
        return m_TD.index_select(0, torch.div(order_R, rows_TK.shape[1], rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, g_RD: Tensor) -> tuple[Tensor, None, None]:
        (rows_TK,) = ctx.saved_tensors
        return _run(_sum_rows, g_RD, rows_TK), None, None


class _Gate(torch.autograd.Function):
    """``relu(gate) * up``, and how many of a row's neurons are active: ``[R]`` int64."""

    @staticmethod
    def forward(ctx: Any, h_RC: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h_RC)
        a_RF, active_R = _run(_gate, h_RC)
        ctx.mark_non_differentiable(active_R)
        return a_RF, active_R

    @staticmethod
    def backward(ctx: Any, ga_RF: Tensor, _: Tensor) -> Tensor:
        (h_RC,) = ctx.saved_tensors
        gradient: Tensor = _run(_gate_backward, ga_RF, h_RC)
        return gradient


class _Combine(torch.autograd.Function):
    """Each token's weighted sum over its K rows."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, order_R, rows_TK)
        out_TD: Tensor = _run(_weighted_sum, y_RD, weights_TK, rows_TK)
        return out_TD

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, weights_TK, order_R, rows_TK = ctx.saved_tensors
        g_TD = g_TD.contiguous()
        g_weights_TK = _run(_row_products, g_TD, y_RD, rows_TK).to(weights_TK.dtype)
        return _run(_weighted_rows, g_TD, weights_TK, order_R), g_weights_TK, None, None


def grouped_experts(
    m_TD: Tensor, weights_TK: Tensor, order_R: Tensor, ends_E: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sum of every token's experts.

    Args:
        m_TD: normed residual stream, in the products' dtype (bfloat16, or float32 on CPUs).
        weights_TK: weights of the chosen experts.
        order_R: the rows ``t * K + k`` in the order of their experts.
        ends_E: int32, where each expert's rows end.
        gate_up_ECD: gate above up.
        down_EDF: down projection.

    Returns:
        ``[T, D]``, and the active neurons of every row in the order of experts: ``[R]`` int64.
    """
    places_R = torch.arange(order_R.shape[0], device=order_R.device)
    rows_TK = torch.empty_like(order_R).scatter_(0, order_R, places_R).view(weights_TK.shape)
    m_RD = _Dispatch.apply(m_TD, order_R, rows_TK)
    h_RC = F.grouped_mm(m_RD, gate_up_ECD.to(m_TD.dtype).transpose(1, 2), offs=ends_E)
    a_RF, active_R = _Gate.apply(h_RC)
    y_RD = F.grouped_mm(a_RF, down_EDF.to(m_TD.dtype).transpose(1, 2), offs=ends_E)
    return _Combine.apply(y_RD, weights_TK, order_R, rows_TK), active_R
