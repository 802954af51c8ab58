"""A run without the trainer, DeepSpeed and micro-steps: ``plain_run(config, tokens)``, and ranks that run the trainer.

One process takes a whole load-balance group at a time through the model; the optimizer is torch's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.artifacts import StageContext
from components.corpus.categories import CATEGORIES
from components.corpus.shards import TokenShards
from components.pretraining.architecture import model_config
from components.pretraining.config import PretrainConfig
from components.pretraining.data.batches import BatchSource
from components.pretraining.deepspeed.initial_model import initial_model
from components.pretraining.processes.ranks import Ranks
from components.pretraining.training.head_loss import token_losses
from components.weights.optimizer import parameter_groups
from model import LoadBalance
from model.masks import document_ids


@dataclass
class PlainRun:
    """What a run gave.

    Attributes:
        weights: fp32, by stage and name, at each training stage's end.
        metrics: by step, under the names of ``metrics.jsonl``; none for skipped steps.
    """

    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)


def plain_run(config: PretrainConfig, tokens: Path, skipped: Collection[int] = ()) -> PlainRun:
    """Train ``config``; ``skipped`` steps are left out.

    In bf16 forward and backward run in bf16, sums of gradients and the optimizer in fp32.
    """
    shards = TokenShards.open(tokens)
    streams = {name: shards.shard("train", name) for name in shards.categories("train")}
    source = BatchSource(config, streams, shards.eos_id)
    model = initial_model(config, model_config(config, shards), Ranks(precision=config.precision))
    model.balance = LoadBalance()
    model.train()
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    by_parameter = {id(p): masters[name] for name, p in model.named_parameters()}
    part = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {**group, "params": [by_parameter[id(p)] for p in group["params"]]}
            for group in parameter_groups(model, part.weight_decay)
        ],
        betas=(part.beta1, part.beta2),
        eps=part.eps,
    )
    run = PlainRun()
    for span in source.curriculum.spans:
        model.config.rope_theta = span.stage.rope_theta
        for step in range(span.start, span.end):
            if step in skipped:
                continue
            run.metrics[step] = _gradients(model, masters, source, config, step, span.stage.context)
            run.metrics[step]["train/grad_norm"] = float(
                torch.nn.utils.clip_grad_norm_(masters.values(), part.clip_norm)
            )
            for group in optimizer.param_groups:
                group["lr"] = source.curriculum.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(masters[name])
        run.weights[span.name] = {name: master.detach().clone() for name, master in masters.items()}
    return run


def _gradients(
    model: Any,
    masters: dict[str, Tensor],
    source: BatchSource,
    config: PretrainConfig,
    step: int,
    context: int,
) -> dict[str, float]:
    """Add the step's gradients to the masters; its losses."""
    sequences = source.sequences(step)
    rows_BT = source.read(sequences, context)
    category_B = torch.from_numpy(sequences.category_B)
    count, groups = len(rows_BT), config.load_balance_groups
    found = dict.fromkeys(("train/ce", "train/load_balance", "train/router_z"), 0.0)
    nats_B = torch.zeros(count)
    # In fp32 a group at once; in bf16 a row at once, so that sums over rows are in fp32.
    for group in range(groups):
        mine = range(group * count // groups, (group + 1) * count // groups)
        parts = [slice(mine.start, mine.stop)]
        if config.precision == "bf16":
            parts = [slice(row, row + 1) for row in mine]
            with torch.no_grad(), model.balance.counting():
                for part in parts:
                    model(
                        input_ids=rows_BT[part],
                        document_ids=_documents(rows_BT[part], source),
                        use_cache=False,
                    )
        for part in parts:
            ids_BT = rows_BT[part]
            out = model(input_ids=ids_BT, document_ids=_documents(ids_BT, source), use_cache=False)
            losses_BT = token_losses(out.logits, ids_BT)
            weight = len(ids_BT) / count
            loss = losses_BT.mean() + config.load_balance_coef * out.load_balance_loss.sum()
            ((loss + config.router_z_coef * out.router_z_loss.sum()) * weight).backward()
            nats_B[part] = losses_BT.detach().mean(dim=1)
            losses = losses_BT.mean(), out.load_balance_loss.mean(), out.router_z_loss.mean()
            for name, value in zip(found, losses, strict=True):
                found[name] += float(value.detach()) * weight
            for name, parameter in model.named_parameters():
                gradient = parameter.grad.float()
                masters[name].grad = gradient if masters[name].grad is None else masters[name].grad + gradient
                parameter.grad = None
        model.balance.reset()
    for category in category_B.unique().tolist():
        found[f"train/ce/{CATEGORIES[category]}"] = float(nats_B[category_B == category].mean())
    return found


def _documents(ids_BT: Tensor, source: BatchSource) -> Tensor:
    return document_ids(ids_BT, source._eos_id)


# ---------------------------------------------------------------- the trainer, in one of several processes


@dataclass(frozen=True)
class Run:
    """A run of the trainer.

    Attributes:
        name: of its folder.
        config: values of ``PretrainConfig``.
        stop_at: save and stop after this step.
        go_on: after a stop go on in a new engine.
        poison: (step, micro-step) whose loss is made NaN on the last rank.
    """

    name: str
    config: dict[str, Any]
    stop_at: int | None = None
    go_on: bool = True
    poison: tuple[int, int] | None = None


def train_all(runs: list[Run], tokens: Path, place: Path) -> None:
    """Run the trainer for one after the other, on the ranks that torchrun's environment says."""
    for run in runs:
        out = place / run.name
        out.mkdir(exist_ok=True)
        if run.stop_at is not None:
            _train(run, tokens, out, run.stop_at)
        if run.stop_at is None or run.go_on:
            _train(run, tokens, out, None)
    torch.distributed.barrier()
    os._exit(0)  # skip the tear-down of gloo, which waits for its peers


def _train(run: Run, tokens: Path, out: Path, stop_at: int | None) -> None:
    from components.pretraining.stage import train_here
    from components.pretraining.training import training_step
    from components.pretraining.training.trainer import TrainingInterrupted

    gradients, loss = training_step.TrainingStep.gradients, training_step.training_loss
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    at = [-1, 0]

    def watched(self: Any, step: int) -> Any:
        at[:] = step, 0
        if step == stop_at and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(self, step)

    def poisoned(*arguments: Any) -> Tensor:
        found = loss(*arguments)
        if tuple(at) == run.poison and rank == world - 1:
            found = found * torch.nan
        at[1] += 1
        return found

    training_step.TrainingStep.gradients = watched  # type: ignore[method-assign]
    training_step.training_loss = poisoned
    context = StageContext("pretrain", "tiny", run.config, {"tokenize": tokens}, out, out.parent / "cache")
    try:
        train_here(context, PretrainConfig.model_validate(run.config))
        assert stop_at is None
    except TrainingInterrupted:
        assert stop_at is not None
    finally:
        context.close()
        training_step.TrainingStep.gradients = gradients  # type: ignore[method-assign]
        training_step.training_loss = loss
