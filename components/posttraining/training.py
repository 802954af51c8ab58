"""Supervised fine-tuning of a loaded model: ``Trainer(model, rows, config, folder).train(...)``.

A plain PyTorch loop. The stage fine-tunes for minutes, not weeks, and fits one device wherever the model does, so
nothing of a sharding engine would be used; several processes train data-parallel, with all-reduced gradients.

The loss of an optimizer step is the weighted mean over *all* its assistant tokens, whatever the split into
micro-batches and processes: each part contributes its sum divided by the step's weight. Router losses are averaged over
the parts.

Legend: B rows, T tokens, N trained tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from components.artifacts import StageError, canonical_json
from components.posttraining.config import PosttrainConfig
from components.posttraining.packing import IGNORED_LABEL, PackedBatch, PackedRows
from components.weights.checkpoint_store import CheckpointStore
from components.weights.optimizer import parameter_groups
from model import SmallThinkerForCausalLM

_STATE_NAME = "state.pt"
_KEPT_CHECKPOINTS = 2
_DIVERGENCE_WINDOW = 5
_DIVERGENCE_RATIO = 2.0


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, then cosine or linear decay to ``final_ratio`` of the peak."""

    peak_lr: float
    final_ratio: float
    warmup_steps: int
    total_steps: int
    kind: str

    @classmethod
    def of(cls, config: PosttrainConfig, total_steps: int) -> Schedule:
        """The schedule of a run of ``total_steps`` optimizer steps."""
        warmup = min(total_steps - 1, math.ceil(config.warmup_ratio * total_steps))
        return cls(config.peak_lr, config.final_lr_ratio, warmup, total_steps, config.schedule)

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (0-based)."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps)
        falling = 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak_lr * (self.final_ratio + (1.0 - self.final_ratio) * falling)


@dataclass
class Progress:
    """What a resumed run needs besides weights and optimizer state."""

    step: int = 0
    losses: list[float] = field(default_factory=list)


def total_steps(config: PosttrainConfig, rows: int) -> int:
    """Optimizer steps of the run: the epochs' worth, at least 1 and at most ``max_steps``."""
    return min(config.max_steps, max(1, math.ceil(config.epochs * rows / config.rows_per_step)))


class AssistantLosses(NamedTuple):
    """Losses of one forward pass.

    Attributes:
        nats_N: cross-entropy of each of the N trained tokens, float32, rows first.
        weights_N: their weights.
        load_balance_loss, router_z_loss: the routers', unweighted: ``[L]``.
    """

    nats_N: Tensor
    weights_N: Tensor
    load_balance_loss: Tensor
    router_z_loss: Tensor


def assistant_losses(model: SmallThinkerForCausalLM, batch: PackedBatch) -> AssistantLosses:
    """Run a batch and score its trained tokens; the output matrix is applied at their places only."""
    output = model.model(
        input_ids=batch.input_ids_BT,
        position_ids=batch.position_ids_BT,
        document_ids=batch.document_ids_BT,
        use_cache=False,
    )
    targets_BT = batch.labels_BT[:, 1:]
    trained_BT = targets_BT != IGNORED_LABEL
    logits_NV = model.lm_head(output.last_hidden_state[:, :-1][trained_BT])
    nats_N = F.cross_entropy(logits_NV.float(), targets_BT[trained_BT], reduction="none")
    weights_N = batch.weights_BT[:, 1:][trained_BT]
    return AssistantLosses(nats_N, weights_N, output.load_balance_loss, output.router_z_loss)


class Trainer:
    """Trains ``model`` in place on packed rows; resumable, and bit-equal to an undisturbed run when resumed.

    Args:
        model: float32 weights on the device to train on.
        rows: the packed training dialogues.
        config: the stage's config.
        folder: where checkpoints to resume from are kept.

    Raises:
        StageError: the rows of a step cannot be shared evenly by the processes.
    """

    def __init__(
        self, model: SmallThinkerForCausalLM, rows: PackedRows, config: PosttrainConfig, folder: Path
    ) -> None:
        self.model, self.rows, self.config = model, rows, config
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.rows_per_step % (config.rows_per_micro_batch * self.world):
            raise StageError(
                f"rows_per_step is {config.rows_per_step}; with {self.world} processes and micro-batches of "
                f"{config.rows_per_micro_batch} rows it must be a multiple of "
                f"{config.rows_per_micro_batch * self.world}."
            )
        self.total_steps = total_steps(config, len(rows))
        self.schedule = Schedule.of(config, self.total_steps)
        self.progress = Progress()
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.peak_lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )
        self._store = CheckpointStore(folder, keep=_KEPT_CHECKPOINTS)
        digest = hashlib.sha256(canonical_json(config.model_dump(mode="json")).encode())
        for dialogue in rows.dialogues:
            digest.update(repr(dialogue.ids).encode())
        self._identity = digest.hexdigest()

    def resume(self) -> list[str]:
        """Continue from the newest whole checkpoint of the same config and data, if there is one.

        Returns:
            One sentence for every damaged checkpoint that was passed over.
        """
        checkpoint, complaints = self._store.newest()
        if checkpoint is None:
            return complaints
        state = torch.load(checkpoint.path / _STATE_NAME, map_location=self.device, weights_only=True)
        if state["identity"] != self._identity:
            return [*complaints, "Passed over a checkpoint that belongs to another config or other data."]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(checkpoint.step, list(state["losses"]))
        if self.rank == 0:
            self._store.discard_after(checkpoint.step)
        return complaints

    def save(self) -> None:
        """Write a checkpoint atomically; rank 0 writes, the others wait at a barrier."""
        if self.rank == 0:
            state = {
                "identity": self._identity,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "losses": self.progress.losses,
            }
            torch.save(state, self._store.prepare(self.progress.step) / _STATE_NAME)
            self._store.commit(self.progress.step)
        if self.world > 1:
            dist.barrier()

    def train(
        self,
        log: Callable[[Mapping[str, float], int], None],
        kept: Mapping[int, Callable[[], None]] | None = None,
    ) -> None:
        """Run to the last step.

        Args:
            log: receives metrics and the number of finished steps.
            kept: actions by number of finished steps, run before that step's checkpoint.

        Raises:
            StageError: loss or gradient is not finite, or the run diverges; names the step.
        """
        config, progress = self.config, self.progress
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        self.model.train()
        bar = tqdm(
            total=self.total_steps, initial=progress.step, desc="SFT", unit="step", disable=self.rank > 0
        )
        began, tokens = time.monotonic(), 0
        with bar:
            while progress.step < self.total_steps:
                figures = self._step(progress.step)
                progress.step += 1
                progress.losses.append(figures["train/loss"])
                self._check_divergence()
                tokens += int(figures["train/tokens"])
                bar.update()
                bar.set_postfix(loss=f"{figures['train/loss']:.3f}")
                last = progress.step == self.total_steps
                if progress.step % config.log_every_steps == 0 or last:
                    figures["train/tokens_per_second"] = tokens / (time.monotonic() - began)
                    log(figures, progress.step)
                if kept and progress.step in kept:
                    kept[progress.step]()
                if progress.step % config.checkpoint_every_steps == 0 or last:
                    self.save()
        self.model.train(False)

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        config = self.config
        batch = self.rows.batch(step, config.rows_per_step)
        total_weight = float(batch.weights_BT.sum(dtype=torch.float64)) or 1.0
        micro = config.rows_per_micro_batch
        parts = config.rows_per_step // micro
        ce_sum = torch.zeros((), device=self.device)
        balance_sum = torch.zeros((), device=self.device)
        for start in range(self.rank * micro, config.rows_per_step, micro * self.world):
            part = batch.rows(slice(start, start + micro)).trimmed().to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                losses = assistant_losses(self.model, part)
            ce = (losses.nats_N * losses.weights_N).sum() / total_weight
            router = (
                config.load_balance_coef * losses.load_balance_loss.sum()
                + config.router_z_coef * losses.router_z_loss.sum()
            ) / parts
            (ce + router).backward()  # type: ignore[no-untyped-call]
            ce_sum += ce.detach()
            balance_sum += losses.load_balance_loss.detach().mean() / parts
        self._all_reduce(ce_sum, balance_sum)
        loss = float(ce_sum)
        if not math.isfinite(loss):
            raise StageError(
                f"SFT step {step + 1}: the loss is {loss}; lower posttrain.peak_lr or clip_norm."
            )
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm))
        if not math.isfinite(norm):
            raise StageError(f"SFT step {step + 1}: the gradient's norm is {norm}; lower posttrain.peak_lr.")
        lr = self.schedule.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.balance.reset()
        return {
            "train/loss": loss,
            "train/load_balance_loss": float(balance_sum),
            "train/gradient_norm": norm,
            "train/lr": lr,
            "train/trained_tokens": float(batch.trained_tokens),
            "train/tokens": float(int((batch.document_ids_BT >= 0).sum())),
        }

    def _all_reduce(self, *sums: Tensor) -> None:
        if self.world == 1:
            return
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        for tensor in sums:
            dist.all_reduce(tensor)

    def _check_divergence(self) -> None:
        losses = self.progress.losses
        if len(losses) < 2 * _DIVERGENCE_WINDOW:
            return
        first = statistics.median(losses[:_DIVERGENCE_WINDOW])
        last = statistics.median(losses[-_DIVERGENCE_WINDOW:])
        if last > _DIVERGENCE_RATIO * first:
            raise StageError(
                f"SFT step {self.progress.step}: the run diverges, the loss went from {first:.2f} to {last:.2f} nats; "
                "lower posttrain.peak_lr."
            )
