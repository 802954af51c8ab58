"""Metrics of a training step, summed over micro-steps and ranks: ``StepMeter`` fills, ``Interval`` averages.

All sums lie in one float64 vector, so that a step needs one all-reduce and the interval's
state is plain JSON, saved with each checkpoint: a resumed run logs the same averages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from components.corpus.categories import CATEGORIES
from components.pretraining.data.batches import MicroBatch
from components.pretraining.processes.ranks import Ranks

if TYPE_CHECKING:
    from model import SmallThinkerConfig


class Layout:
    """Where each metric lies in the vector of sums."""

    def __init__(self, layers: int, experts: int, top_k: int, expert_hidden: int) -> None:
        self.layers, self.experts, self.top_k, self.expert_hidden = layers, experts, top_k, expert_hidden
        self.fields = {
            "micro_steps": 1,
            "ce": 1,
            "load_balance": layers,
            "router_z": layers,
            "tokens": 1,
            "nats_by_category": len(CATEGORIES),
            "targets_by_category": len(CATEGORIES),
            "expert_counts": layers * experts,
            "active_neurons": layers,
            "router_entropy": layers,
            "mean_scores": layers * experts,
            "groups": 1,
            "group_load_max": layers,
        }
        self.slices: dict[str, slice] = {}
        start = 0
        for name, width in self.fields.items():
            self.slices[name] = slice(start, start + width)
            start += width
        self.width = start

    @classmethod
    def of(cls, config: SmallThinkerConfig) -> Layout:
        """The layout for a model."""
        return cls(
            config.num_hidden_layers,
            config.moe_num_primary_experts,
            config.moe_num_active_primary_experts,
            config.moe_ffn_hidden_size,
        )

    def expert_counts(self, pooled: Tensor) -> Tensor:
        """Tokens of a step that chose each expert, ``[L, E]``, from its sums over all ranks."""
        return pooled[self.slices["expert_counts"]].view(self.layers, self.experts)

    def mean_loss(self, pooled: Tensor) -> float:
        """Mean cross-entropy of a step, from its sums over all ranks."""
        return float(pooled[self.slices["ce"]] / pooled[self.slices["micro_steps"]])


class RouterEntropy:
    """Mean entropy of the routers' softmax over all experts, as a share of ln E, computed in forward hooks.

    1 means that the router does not discriminate at all, 0 that it is always certain.
    """

    def __init__(self, model: nn.Module) -> None:
        from model.experts import Router

        self._values: list[Tensor] = []
        routers = [module for module in model.modules() if isinstance(module, Router)]
        self._layers = len(routers)
        for router in routers:
            router.register_forward_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: Any, routing: Any) -> None:
        if not module.training:
            return
        with torch.no_grad():
            log_p_TE = F.log_softmax(routing.logits_TE.detach().float(), dim=-1)
            self._values.append(-(log_p_TE.exp() * log_p_TE).sum(-1))
        self._most = math.log(log_p_TE.shape[-1])

    def take(self, tokens: int | None = None) -> Tensor:
        """Entropies ``[L]`` of the last forward; call it between forward and backward (which may recompute layers).

        Args:
            tokens: only the first ``tokens`` count, the rest are padding; ``None``: all.
        """
        values_LT = torch.stack(self._values[-self._layers :])[:, :tokens]
        self._values.clear()
        return values_LT.mean(dim=1) / self._most if tokens != 0 else values_LT.new_zeros(self._layers)


class StepMeter:
    """Accumulates one optimizer step's metrics."""

    def __init__(self, layout: Layout, ranks: Ranks) -> None:
        self._layout, self._ranks = layout, ranks
        self._sums = torch.zeros(layout.width, dtype=torch.float64, device=ranks.device)

    def reset(self) -> None:
        """Begin the next step."""
        self._sums.zero_()

    @torch.no_grad()
    def add(self, batch: MicroBatch, losses_BT: Tensor, ce: Tensor, out: Any, entropy_L: Tensor) -> None:
        """Take one micro-step into account; means weigh as much as it has rows that are no padding."""
        at, sums, weight = self._layout.slices, self._sums, batch.rows / len(batch.category_B)
        category_B = batch.category_B[: batch.rows].to(sums.device, non_blocking=True)
        nats_B = losses_BT[: batch.rows].detach().double().sum(dim=1)
        targets_B = torch.full_like(nats_B, losses_BT.shape[1])
        sums[at["micro_steps"]] += weight
        sums[at["ce"]] += ce.detach().double() * weight
        sums[at["load_balance"]] += out.load_balance_loss.detach().double() * weight
        sums[at["router_z"]] += out.router_z_loss.detach().double() * weight
        sums[at["tokens"]] += out.router_stats.tokens
        sums[at["nats_by_category"]].index_add_(0, category_B, nats_B)
        sums[at["targets_by_category"]].index_add_(0, category_B, targets_B)
        sums[at["expert_counts"]] += out.router_stats.expert_counts.flatten()
        sums[at["active_neurons"]] += out.router_stats.active_neurons
        sums[at["router_entropy"]] += entropy_L.to(sums.device).double() * weight
        sums[at["mean_scores"]] += out.router_stats.mean_scores.flatten().double() * weight

    @torch.no_grad()
    def add_group(self, counts_LE: Tensor) -> None:
        """Take a finished load-balance group into account: its pooled expert counts ``[L, E]``."""
        loads_LE = counts_LE.double() / counts_LE.sum(dim=1, keepdim=True)
        self._sums[self._layout.slices["groups"]] += 1  # once per rank of the group: only the ratio is used
        self._sums[self._layout.slices["group_load_max"]] += loads_LE.max(dim=1).values * self._layout.experts

    def pooled(self) -> Tensor:
        """The step's sums over all ranks (an all-reduce), float64 on the CPU; every rank gets the same."""
        if self._ranks.world > 1:
            dist.all_reduce(self._sums)
        return self._sums.cpu()


def global_balance(layout: Layout, pooled: Tensor) -> float:
    """Mean over layers of a step's load-balance loss at global scope: frequencies and scores over the whole batch.

    Args:
        layout: where the sums lie.
        pooled: one step's sums over all ranks.
    """
    counts_LE = layout.expert_counts(pooled)
    scores_LE = pooled[layout.slices["mean_scores"]].view(layout.layers, layout.experts)
    frequencies_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
    scores_LE = scores_LE / pooled[layout.slices["micro_steps"]].clamp(min=1)
    return float(layout.experts * (frequencies_LE * scores_LE).sum(dim=1).mean())


class Interval:
    """Sums over the steps since the last logged line."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sums = torch.zeros(layout.width, dtype=torch.float64)
        self._grad_norm_sum, self._global_balance_sum = 0.0, 0.0
        self._steps, self._skipped = 0, 0

    def skip(self) -> None:
        """A step was skipped: it is counted, and its metrics are left out of the averages."""
        self._skipped += 1

    def add(self, pooled: Tensor, grad_norm: float) -> None:
        """Take a finished step into account."""
        self._sums += pooled
        self._grad_norm_sum += grad_norm
        self._global_balance_sum += global_balance(self._layout, pooled)
        self._steps += 1

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "sums": self._sums.tolist(),
            "grad_norm_sum": self._grad_norm_sum,
            "global_balance_sum": self._global_balance_sum,
            "steps": self._steps,
            "skipped": self._skipped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`to_state`."""
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)
        self._grad_norm_sum, self._steps = float(state["grad_norm_sum"]), int(state["steps"])
        self._global_balance_sum = float(state["global_balance_sum"])
        self._skipped = int(state["skipped"])

    def _field(self, name: str) -> Tensor:
        return self._sums[self._layout.slices[name]]

    def loads(self) -> Tensor:
        """Every expert's share of its layer's tokens, 1 at balance: ``[L, E]``; zeros without a step."""
        counts_LE = self._field("expert_counts").view(self._layout.layers, self._layout.experts)
        return counts_LE * self._layout.experts / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)

    def drain(self) -> dict[str, float]:
        """Averages under their names in ``metrics.jsonl``; the next interval starts empty.

        Without a step that was taken there are none, only the number of skipped ones.
        """
        skipped = {"train/skipped": float(self._skipped)}
        metrics = {**self._averages(), **skipped} if self._steps else skipped
        self._sums.zero_()
        self._grad_norm_sum, self._global_balance_sum = 0.0, 0.0
        self._steps, self._skipped = 0, 0
        return metrics

    def _averages(self) -> dict[str, float]:
        layout = self._layout
        micro = max(1.0, float(self._field("micro_steps")))
        tokens = max(1.0, float(self._field("tokens")))
        metrics = {"train/ce": float(self._field("ce")) / micro}
        for name in ("load_balance", "router_z"):
            loss_L = self._field(name) / micro
            metrics[f"train/{name}"] = float(loss_L.mean())
            metrics.update({f"train/{name}/layer{layer:02d}": float(x) for layer, x in enumerate(loss_L)})
        metrics["train/load_balance_global"] = self._global_balance_sum / self._steps
        metrics["train/grad_norm"] = self._grad_norm_sum / self._steps
        nats, targets = self._field("nats_by_category"), self._field("targets_by_category")
        for category, name in enumerate(CATEGORIES):
            if targets[category] > 0:
                metrics[f"train/ce/{name}"] = float(nats[category] / targets[category])
        load_LE = self.loads()
        sparsity_L = 1.0 - self._field("active_neurons") / (tokens * layout.top_k * layout.expert_hidden)
        share_LE = load_LE / layout.experts
        load_entropy_L = -torch.xlogy(share_LE, share_LE).sum(dim=1) / math.log(layout.experts)
        entropy_L = self._field("router_entropy") / micro
        for layer in range(layout.layers):
            metrics[f"router/load_max/layer{layer:02d}"] = float(load_LE[layer].max())
            metrics[f"router/load_min/layer{layer:02d}"] = float(load_LE[layer].min())
            metrics[f"router/load_entropy/layer{layer:02d}"] = float(load_entropy_L[layer])
            metrics[f"router/entropy/layer{layer:02d}"] = float(entropy_L[layer])
            metrics[f"experts/sparsity/layer{layer:02d}"] = float(sparsity_L[layer])
        metrics["router/load_max"] = float(load_LE.max())
        metrics["router/load_min"] = float(load_LE.min())
        metrics["router/load_entropy"] = float(load_entropy_L.mean())
        group_max_L = self._field("group_load_max") / max(1.0, float(self._field("groups")))
        metrics["router/load_max_group"] = float(group_max_L.max())
        metrics["router/entropy"] = float(entropy_L.mean())
        metrics["experts/sparsity"] = float(sparsity_L.mean())
        return metrics
