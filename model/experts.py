"""Router and experts: the router reads the raw residual stream, the experts the normed one.

``expert(m) = down(relu(gate(m)) * up(m))``; a token's output is the weighted sum over its K experts, the weight applied
after ``down``. Source: arXiv 2507.20984 section 2 and the released code.

Legend: T tokens (batch and sequence flattened), D model, E experts, F expert hidden, C = 2F (gate above up), K top-k,
R = T * K token-expert rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.configuration import SmallThinkerConfig

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
        backend = self.backend
        if backend == "auto":
            backend = "grouped" if m_TD.is_cuda else "loop"
        if backend == "dense":
            return self._dense(m_TD, weights_TK, experts_TK, valid_T)
        top_k = experts_TK.shape[1]
        flat_R = experts_TK.reshape(-1)
        sorted_R, order_R = torch.sort(flat_R, stable=True)
        tokens_R = torch.div(order_R, top_k, rounding_mode="floor")
        counts_E = count_experts(experts_TK, self.num_experts, None)
        m_RD = m_TD.index_select(0, tokens_R)
        y_RD, hidden_RF = (self._grouped if backend == "grouped" else self._loop)(m_RD, counts_E)
        y_RD = y_RD * weights_TK.reshape(-1).index_select(0, order_R)[:, None]
        # Rows are in ascending expert order, so on a CPU this adds in the order of the official code.
        out_TD = torch.zeros_like(m_TD).index_add_(0, tokens_R, y_RD.to(m_TD.dtype))
        with torch.no_grad():
            active_R = (hidden_RF > 0).sum(dim=-1)
            if valid_T is not None:
                active_R = active_R * valid_T.index_select(0, tokens_R)
            active_E = torch.zeros_like(counts_E).scatter_add_(0, sorted_R, active_R)
        return out_TD, active_E

    def _loop(self, m_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        outputs, gates = [], []
        # unbind, not indexing: its backward fills one gradient instead of a full-size one per expert.
        for m_rD, gate_up_CD, down_DF in zip(
            m_RD.split(counts_E.tolist()), self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True
        ):
            gate_rF, up_rF = F.linear(m_rD, gate_up_CD).chunk(2, dim=-1)
            gate_rF = F.relu(gate_rF)
            gates.append(gate_rF.detach())
            outputs.append(F.linear(gate_rF * up_rF, down_DF))
        return torch.cat(outputs), torch.cat(gates)

    def _grouped(self, m_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate_up_EDC = self.gate_up_proj.to(m_RD.dtype).transpose(1, 2)
        down_EFD = self.down_proj.to(m_RD.dtype).transpose(1, 2)
        gate_RF, up_RF = F.grouped_mm(m_RD, gate_up_EDC, offs=ends_E).chunk(2, dim=-1)
        gate_RF = F.relu(gate_RF)
        return F.grouped_mm(gate_RF * up_RF, down_EFD, offs=ends_E), gate_RF.detach()

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
