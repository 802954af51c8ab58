"""One optimizer step up to its gradients: ``TrainingStep(engine, config, batches, ranks).gradients(step)``.

What the optimizer then does with them, and whether, is the trainer's decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.pretraining.config import PretrainConfig
from components.pretraining.data.batches import MicroBatch
from components.pretraining.data.curriculum import Curriculum
from components.pretraining.processes.ranks import Ranks
from components.pretraining.training.head_loss import fused_token_losses
from components.pretraining.training.step_parts import part
from components.pretraining.training.telemetry import Layout, RouterEntropy, StepMeter


@dataclass(frozen=True)
class Gradients:
    """The outcome of a step whose gradients are in the engine.

    Attributes:
        pooled: the step's sums over all ranks, see :class:`components.pretraining.training.telemetry.Layout`.
        loss: mean cross-entropy in nats.
        waited_s: seconds spent waiting for data.
    """

    pooled: Tensor
    loss: float
    waited_s: float


def training_loss(ce: Tensor, out: Any, config: PretrainConfig) -> Tensor:
    """What is minimised: the mean cross-entropy and, summed over layers, the routers' two losses at their weights."""
    balance, router_z = out.load_balance_loss.sum(), out.router_z_loss.sum()
    loss: Tensor = ce + config.load_balance_coef * balance + config.router_z_coef * router_z
    return loss


class TrainingStep:
    """Forward and backward of all micro-steps of a step.

    Args:
        engine: DeepSpeed's, around the model.
        config: the recipe's part.
        batches: gives this process's micro-batches of a step, by load-balance group.
        ranks: this process's place.
    """

    def __init__(
        self,
        engine: Any,
        config: PretrainConfig,
        batches: Callable[[int], Sequence[Sequence[MicroBatch]]],
        ranks: Ranks,
    ) -> None:
        self._engine, self._config, self._batches, self._ranks = engine, config, batches, ranks
        self._curriculum = Curriculum(config)
        self.layout = Layout.of(engine.module.config)
        self._meter = StepMeter(self.layout, ranks)
        self._entropy = RouterEntropy(engine.module)

    def _forward(self, batch: MicroBatch, through: Any) -> Any:
        """One forward pass of the model, or of the engine around it, which takes part in the backward pass."""
        device = self._ranks.device
        return through(
            input_ids=batch.input_ids_BT.to(device, non_blocking=True),
            document_ids=batch.document_ids_BT.to(device, non_blocking=True),
            # Other rows are whole windows; looking would synchronise with the device.
            padded=batch.padding > 0,
            use_cache=False,
            logits_to_keep=1,  # the loss applies the output matrix itself
            output_hidden_states=True,
        )

    def micro_step(self, batch: MicroBatch, weight: float = 1.0) -> None:
        """Forward and backward of one micro-batch.

        Args:
            batch: its rows of padding take part in the collectives and in nothing else.
            weight: of its loss in the step's gradients, which are the mean over the ranks of their weighted sums.
        """
        config, engine = self._config, self._engine
        labels_BT = batch.labels_BT.to(self._ranks.device, non_blocking=True)
        out = self._forward(batch, engine)
        rows = max(1, batch.rows)  # a rank without a row, whose weight is 0, takes part with one of padding
        with part("head and loss"):
            ce, losses_BT = fused_token_losses(
                out.hidden_states[-1][:rows],
                engine.module.lm_head.weight,
                labels_BT[:rows],
                config.loss_chunk_tokens,
            )
            loss = training_loss(ce, out, config) * weight
        self._meter.add(batch, losses_BT, ce, out, self._entropy.take(batch.rows * batch.labels_BT.shape[1]))
        engine.backward(loss, scale_wrt_gas=False)

    def _count_exactly(self, group: Sequence[MicroBatch]) -> None:
        """Run a load-balance group once without gradients, so that its counts are those of all its tokens."""
        with torch.no_grad(), self._engine.module.balance.counting():
            for batch in group:
                self._forward(batch, self._engine.module)
                self._entropy.take()

    def gradients(self, step: int) -> Gradients:
        """Run step ``step``; a collective, after which every rank has the same sums."""
        began = time.perf_counter()
        with part("data"):
            groups = self._batches(step)
        waited_s = time.perf_counter() - began
        self._engine.train()
        self._meter.reset()
        left, balance = sum(map(len, groups)), self._engine.module.balance
        sequences = self._curriculum.at(step).stage.sequences_per_step
        for group in groups:
            if self._config.load_balance_counts == "exact":
                self._count_exactly(group)
            for batch in group:
                left -= 1
                # DeepSpeed would count micro-steps over the whole process, whatever a training stage's batch.
                self._engine.set_gradient_accumulation_boundary(left == 0)
                self.micro_step(batch, batch.rows * self._ranks.world / sequences)
            self._meter.add_group(balance.counts)
            balance.reset()
        pooled = self._meter.pooled()
        return Gradients(pooled, self.layout.mean_loss(pooled), waited_s)
