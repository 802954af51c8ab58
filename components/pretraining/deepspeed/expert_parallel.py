"""Expert parallelism: ``shard_experts(model, ranks)``, before the engine is built.

Each rank of an expert-parallel group holds ``E / size`` experts of every layer and computes them for the tokens of the
whole group. Token-expert rows go through all-to-alls of exact sizes: no capacity factor, padding or dropped token. The
router stays in the model, since it reads the layer's raw input. Groups, all-to-all, gradient reduction and checkpoints
are those of DeepSpeed 0.19.8's AutoEP, which knows its layers by their class and their weights by the names
``experts.w1``, ``w2`` and ``w3``. Importing this module imports DeepSpeed, which takes ten seconds.

Legend: T tokens, D model, E experts, F expert hidden, K top-k, R = T * K rows of this rank, S rows received.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import cast

import torch
from deepspeed.checkpoint.autoep_affine import (  # type: ignore[import-untyped]
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (  # type: ignore[import-untyped]
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import (  # type: ignore[import-untyped]
    AutoEPMoELayer,
    _AllToAllV,
    compute_split_plan,
)
from torch import Tensor, nn

from components.pretraining.processes.ranks import Ranks
from model.experts import Experts
from model.modeling import SmallThinkerDecoderLayer, SmallThinkerForCausalLM


class LocalExperts(Experts):
    """One rank's experts, stacked ``[E / size, 2F, D]`` and ``[E / size, D, F]`` under the names DeepSpeed looks for.

    ``w3`` takes no part: DeepSpeed's checkpoints hold three optimised tensors per expert, of which ours need two. It is
    one zero per expert, gets no gradient and stays zero.
    """

    def __init__(self, whole: Experts, local: range) -> None:
        nn.Module.__init__(self)
        self.num_experts = len(local)
        self.backend = whole.backend
        part = slice(local.start, local.stop)
        self.w1 = nn.Parameter(whole.gate_up_proj.detach()[part].clone())
        self.w2 = nn.Parameter(whole.down_proj.detach()[part].clone())
        self.w3 = nn.Parameter(self.w1.new_zeros(self.num_experts, 1, 1))

    @property
    def gate_up_proj(self) -> nn.Parameter:  # type: ignore[override]
        """``[E / size, 2F, D]``."""
        return self.w1

    @property
    def down_proj(self) -> nn.Parameter:  # type: ignore[override]
        """``[E / size, D, F]``."""
        return self.w2


class ExpertParallelExperts(AutoEPMoELayer):  # type: ignore[misc]
    """Stands in for ``model.experts.Experts``; its forward is a collective of the group's ranks.

    Args:
        whole: the layer's experts (may lie on the meta device); this rank's part is copied.
        ranks: this process's place.
    """

    def __init__(self, whole: Experts, ranks: Ranks) -> None:
        # Not AutoEPMoELayer's own: that one converts blocks of Hugging Face models, router included.
        nn.Module.__init__(self)
        self.num_experts = whole.num_experts
        local = ranks.local_experts(whole.num_experts)
        self.num_local_experts = len(local)
        self.ep_size, self.ep_rank = ranks.expert_parallel, ranks.expert_rank
        self.ep_group_name = f"ep_size_{ranks.expert_parallel}"
        self.ep_group = None  # set_deepspeed_parallelism binds it when the engine is built
        self.folding_group_handles = self.tp_group = None
        self.combine_impl, self.comm_backend = "weighted_sum", "comm"
        self.model_family = "smallthinker"
        self.experts = LocalExperts(whole, local)
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, self.ep_size
        )
        for parameter in self.experts.parameters():
            self._mark(parameter)

    def _mark(self, parameter: nn.Parameter) -> None:
        """Tell DeepSpeed over which group to reduce and partition, and how a universal checkpoint merges the shards."""
        logical_shape = [self.num_experts, *parameter.shape[1:]]
        placement = self.expert_placement_descriptor
        marks = {
            "allreduce": False,
            "group_name": self.ep_group_name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": self.ep_group_name,
            DS_AUTOEP_UC_META: {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
            },
        }
        for name, value in marks.items():
            setattr(parameter, name, value)

    def forward(
        self, m_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, valid_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`model.experts.Experts.forward`, whichever rank holds the chosen experts.

        Returns:
            ``[T, D]`` for this rank's tokens, and the active neurons per expert, ``[E]`` int64: of this rank's experts
            over the valid tokens of the whole group, 0 for the others. Summed over the ranks that is the count of all
            tokens, as it is without expert parallelism.
        """
        top_k = experts_TK.shape[1]
        # Two bins per expert, for valid tokens and for padding, so that one exchange of counts gives both.
        bins_R = 2 * experts_TK.reshape(-1)
        if valid_T is not None:
            bins_R = bins_R + (~valid_T).to(bins_R.dtype).repeat_interleave(top_k)
        order_R = torch.sort(bins_R, stable=True).indices
        tokens_R = torch.div(order_R, top_k, rounding_mode="floor")
        local = self.num_local_experts
        splits = compute_split_plan(bins_R, 2 * self.num_experts, self.ep_size, 2 * local, self.ep_group)
        sent, received = splits.input_splits, splits.output_splits
        m_SD = _AllToAllV.apply(self.ep_group, m_TD.index_select(0, tokens_R), sent, received)
        bins_S = (
            torch.arange(2 * local, device=m_TD.device)
            .repeat(self.ep_size)
            .repeat_interleave(splits.local_counts_by_source.reshape(-1), output_size=sum(received))
        )
        experts_S = torch.div(bins_S, 2, rounding_mode="floor")
        ones_S1 = m_SD.new_ones(m_SD.shape[0], 1)
        y_SD, active_e = self.experts(m_SD, ones_S1, experts_S[:, None], bins_S % 2 == 0)
        y_RD = _AllToAllV.apply(self.ep_group, y_SD, received, sent)
        y_RD = y_RD * weights_TK.reshape(-1).index_select(0, order_R)[:, None]
        # Rows are in ascending expert order: on a CPU a token's sum has the order of Experts.
        out_TD = torch.zeros_like(m_TD).index_add_(0, tokens_R, y_RD.to(m_TD.dtype))
        active_E = active_e.new_zeros(self.num_experts)
        active_E[self.ep_rank * local : (self.ep_rank + 1) * local] = active_e
        return out_TD, active_E


def shard_experts(model: SmallThinkerForCausalLM, ranks: Ranks) -> None:
    """Replace every layer's experts by this rank's part of them, in place.

    Raises:
        StageError: ``expert_parallel`` does not divide the processes or the experts.
    """
    ranks.check_experts(model.config.moe_num_primary_experts)
    for module in model.model.layers:
        moe = cast(SmallThinkerDecoderLayer, module).block_sparse_moe
        moe.experts = ExpertParallelExperts(moe.experts, ranks)
