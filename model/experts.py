"""Router and experts: the router reads the raw residual stream, the experts the normed one.

``expert(m) = down(relu(gate(m)) * up(m))``; a token's output is the weighted sum over its K experts, the weight applied
after ``down``. Source: arXiv 2507.20984 section 2 and the released code.

Legend: T tokens (batch and sequence flattened), D model, E experts, F expert hidden, C = 2F (gate above up), K top-k,
R = T * K token-expert rows.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.compiling import takes_kernels
from model.configuration import SmallThinkerConfig
from model.grouped import grouped_experts

Backend = Literal["auto", "loop", "grouped", "dense"]


class Routing(NamedTuple):
    """What the router decided for T tokens.

    Attributes:
        logits_TE: raw router logits.
        weights_TK: weight per chosen expert, in the model's dtype; sums to 1 over K.
        experts_TK: chosen experts, int64.
    """

    logits_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


class Router(nn.Module):
    """Top-k on logits, then softmax (21B) or normalised sigmoid (4B) of the chosen logits."""

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.top_k = config.moe_num_active_primary_experts
        self.softmax = config.moe_primary_router_apply_softmax
        self.weight = nn.Parameter(torch.empty(config.moe_num_primary_experts, config.hidden_size))

    def forward(self, x_TD: Tensor) -> Routing:
        """Route ``[T, D]`` rows of the raw residual stream."""
        logits_TE = F.linear(x_TD, self.weight)
        chosen_TK, experts_TK = torch.topk(logits_TE, self.top_k, dim=-1)
        if self.softmax:
            weights_TK = torch.softmax(chosen_TK.float(), dim=-1).to(x_TD.dtype)
        else:
            weights_TK = torch.sigmoid(chosen_TK)
            weights_TK = (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(x_TD.dtype)
        return Routing(logits_TE, weights_TK, experts_TK)


def count_experts(experts_TK: Tensor, experts: int, valid_T: Tensor | None) -> Tensor:
    """How many valid tokens chose each expert: ``[E]`` int64."""
    flat_R = experts_TK.reshape(-1)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=flat_R.device)
    if valid_T is None:
        ones_R = torch.ones_like(flat_R)
    else:
        ones_R = valid_T.to(torch.int64)[:, None].expand_as(experts_TK).reshape(-1)
    return counts_E.scatter_add_(0, flat_R, ones_R)


class _ExpertLoop(torch.autograd.Function):
    """The experts on rows sorted by expert, one pair of matrix products per expert, for CPUs.

    Written as one autograd node because the plain formulation spends a third of its time on per-expert
    nodes, concatenations and zero-filled slice gradients: everything here lands in preallocated buffers.
    """

    @staticmethod
    def forward(
        ctx: Any, m_RD: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        rows, hidden = m_RD.shape[0], down_EDF.shape[2]
        h_RC = m_RD.new_empty(rows, 2 * hidden)
        for m_rD, h_rC, gate_up_CD in zip(m_RD.split(sizes), h_RC.split(sizes), gate_up_ECD, strict=True):
            torch.mm(m_rD, gate_up_CD.t(), out=h_rC)
        active_RF = h_RC[:, :hidden] > 0
        a_RF = torch.relu(h_RC[:, :hidden]).mul_(h_RC[:, hidden:])
        y_RD = torch.empty_like(m_RD)
        for a_rF, y_rD, down_DF in zip(a_RF.split(sizes), y_RD.split(sizes), down_EDF, strict=True):
            torch.mm(a_rF, down_DF.t(), out=y_rD)
        ctx.save_for_backward(m_RD, gate_up_ECD, down_EDF, h_RC, active_RF, a_RF)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(active_RF)
        return y_RD, active_RF

    @staticmethod
    def backward(ctx: Any, gy_RD: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        m_RD, gate_up_ECD, down_EDF, h_RC, active_RF, a_RF = ctx.saved_tensors
        sizes, hidden = ctx.sizes, down_EDF.shape[2]
        gy_RD = gy_RD.contiguous()
        g_gate_up_ECD, g_down_EDF = torch.empty_like(gate_up_ECD), torch.empty_like(down_EDF)
        ga_RF = torch.empty_like(a_RF)
        for e, (gy_rD, a_rF, ga_rF) in enumerate(
            zip(gy_RD.split(sizes), a_RF.split(sizes), ga_RF.split(sizes), strict=True)
        ):
            torch.mm(gy_rD, down_EDF[e], out=ga_rF)
            torch.mm(gy_rD.t(), a_rF, out=g_down_EDF[e])
        gh_RC = torch.empty_like(h_RC)
        torch.mul(ga_RF, h_RC[:, hidden:], out=gh_RC[:, :hidden])
        gh_RC[:, :hidden].mul_(active_RF)
        torch.mul(ga_RF, torch.relu(h_RC[:, :hidden]), out=gh_RC[:, hidden:])
        gm_RD = torch.empty_like(m_RD)
        for e, (m_rD, gh_rC, gm_rD) in enumerate(
            zip(m_RD.split(sizes), gh_RC.split(sizes), gm_RD.split(sizes), strict=True)
        ):
            torch.mm(gh_rC, gate_up_ECD[e], out=gm_rD)
            torch.mm(gh_rC.t(), m_rD, out=g_gate_up_ECD[e])
        return gm_RD, g_gate_up_ECD, g_down_EDF, None


def _row_quantum(rows: int, experts: int) -> int:
    """Rounding of an expert's rows: about an eighth of its fair share, a power of two from 8 to 128."""
    return min(128, max(8, 1 << (rows // (8 * experts)).bit_length() - 1)) if rows >= 8 * experts else 8


def _pad_rows(sizes: list[int], quantum: int, sorted_R: Tensor) -> tuple[list[int], Tensor]:
    """Round every expert's rows up to a multiple of ``quantum``; returns the sizes and each row's new place."""
    padded = [-(-size // quantum) * quantum for size in sizes]
    shift, shifts = 0, []
    for size, wide in zip(sizes, padded, strict=True):
        shifts.append(shift)
        shift += wide - size
    shift_E = torch.tensor(shifts, device=sorted_R.device)
    return padded, torch.arange(sorted_R.shape[0], device=sorted_R.device) + shift_E[sorted_R]


class Experts(nn.Module):
    """E gated ReLU experts, stacked.

    ``gate_up_proj`` is ``[E, 2F, D]`` (gate's F rows above up's) and ``down_proj`` ``[E, D, F]``, so that one matrix
    product serves gate and up. The files hold one matrix per expert and projection; see ``model.checkpoint``.
    """

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.num_experts = config.moe_num_primary_experts
        width, hidden = config.hidden_size, config.moe_ffn_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, hidden))
        self.backend: Backend = "auto"

    def forward(
        self, m_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, valid_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the chosen experts.

        Args:
            m_TD: normed residual stream.
            weights_TK: weights of the chosen experts.
            experts_TK: the chosen experts.
            valid_T: False for padding, which is computed but not counted.

        Returns:
            ``[T, D]``, and how many of the expert neurons were active (gate > 0) per expert: ``[E]`` int64.
        """
        if torch.is_autocast_enabled(m_TD.device.type):
            low = torch.get_autocast_dtype(m_TD.device.type)
            out_TD, active_E = self._compute(m_TD.to(low), weights_TK, experts_TK, valid_T)
        else:
            out_TD, active_E = self._compute(m_TD, weights_TK, experts_TK, valid_T)
        return out_TD, active_E

    def _compute(
        self, m_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, valid_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        backend = self.backend
        if backend == "auto":
            # Under expert parallelism a rank may receive no row, which the grouped kernel does not accept.
            backend = "grouped" if takes_kernels(m_TD) and experts_TK.numel() else "loop"
        if backend == "dense":
            return self._dense(m_TD, weights_TK, experts_TK, valid_T)
        flat_R = experts_TK.reshape(-1)
        sorted_R, order_R = torch.sort(flat_R, stable=True)
        tokens_R = torch.div(order_R, experts_TK.shape[1], rounding_mode="floor")
        counted_R = None if valid_T is None else valid_T.index_select(0, tokens_R)
        counts_E = count_experts(experts_TK, self.num_experts, None)
        if backend == "grouped":
            ends_E = counts_E.cumsum(0).to(torch.int32)
            out_TD, active_R = grouped_experts(
                m_TD, weights_TK, order_R, ends_E, self.gate_up_proj, self.down_proj
            )
        else:
            weights_R = weights_TK.reshape(-1).index_select(0, order_R)
            sizes = counts_E.tolist()
            if m_TD.dtype != torch.float32:
                # Low-precision products on CPUs compile a kernel per shape (oneDNN), and an expert's number of
                # rows is a new shape at every step: rounding it up makes the products 4 times faster.
                quantum = _row_quantum(flat_R.shape[0], self.num_experts)
                sizes, slots_R = _pad_rows(sizes, quantum, sorted_R)
                rows = sum(sizes)
                if counted_R is None:
                    counted_R = torch.ones_like(slots_R, dtype=torch.bool)
                # Padding rows repeat token 0 with weight 0.
                counted_R = counted_R.new_zeros(rows).index_copy(0, slots_R, counted_R)
                tokens_R = tokens_R.new_zeros(rows).index_copy(0, slots_R, tokens_R)
                weights_R = weights_R.new_zeros(rows).index_copy(0, slots_R, weights_R)
                sorted_R = sorted_R.new_zeros(rows).index_copy(0, slots_R, sorted_R)
            y_RD, active_RF = self._loop(m_TD.index_select(0, tokens_R), sizes)
            y_RD = y_RD * weights_R[:, None]
            # Rows are in ascending expert order, so on a CPU this adds in the order of the official code.
            out_TD = torch.zeros_like(m_TD).index_add_(0, tokens_R, y_RD.to(m_TD.dtype))
            active_R = active_RF.sum(dim=-1)
        with torch.no_grad():
            if counted_R is not None:
                active_R = active_R * counted_R
            active_E = torch.zeros_like(counts_E).scatter_add_(0, sorted_R, active_R)
        return out_TD, active_E

    def _loop(self, m_RD: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        dtype = m_RD.dtype
        y_RD, active_RF = _ExpertLoop.apply(
            m_RD, self.gate_up_proj.to(dtype), self.down_proj.to(dtype), sizes
        )
        return y_RD, active_RF

    def _dense(
        self, m_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, valid_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Every expert on every token, unchosen ones weighted 0: no data-dependent shape, for graph exporters."""
        weights_TE = torch.zeros(
            m_TD.shape[0], self.num_experts, dtype=weights_TK.dtype, device=m_TD.device
        ).scatter(1, experts_TK, weights_TK)
        gate_ETF, up_ETF = torch.matmul(m_TD, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        gate_ETF = F.relu(gate_ETF)
        y_ETD = torch.matmul(gate_ETF * up_ETF, self.down_proj.transpose(1, 2))
        chosen_TE = weights_TE > 0 if valid_T is None else (weights_TE > 0) & valid_T[:, None]
        active_E = ((gate_ETF > 0).sum(dim=-1) * chosen_TE.t()).sum(dim=-1)
        return torch.einsum("etd,te->td", y_ETD, weights_TE), active_E
