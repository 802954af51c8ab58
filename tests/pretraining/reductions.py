"""What ranks send each other in a step, and what a reduction's dtype costs: ``python -m tests.pretraining.reductions``.

The command prints the error of reduced gradients against sums in fp64, for as many ranks as a run of the 21B has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from components.pretraining.config import PretrainConfig
from tests.pretraining.factory import CONTEXT, run_config, stage_config

_WATCHED = (
    "all_reduce",
    "reduce",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_gather_into_tensor",
    "broadcast",
)
_RANKS = 256


def step_config(world: int, micro_steps: int, **values: Any) -> dict[str, Any]:
    """Steps of ``micro_steps`` sequences a rank."""
    batch = world * micro_steps
    stage = stage_config(sequences_per_step=batch, tokens=20 * batch * CONTEXT)
    return run_config(stages=[stage] * 3, sequences_per_micro_batch=1, **values)


@contextmanager
def watched() -> Iterator[list[tuple[str, int, str, int]]]:
    """Collectives of this rank: (function, elements that it gives, dtype, ranks of the group).

    DeepSpeed remembers some of torch's functions when its backend begins, so this surrounds the building of an engine.
    """
    sent: list[tuple[str, int, str, int]] = []
    real = {name: getattr(dist, name) for name in _WATCHED}

    def replacement(name: str) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            given = tensors[1] if name == "reduce_scatter_tensor" else tensors[0]
            group = named.get("group") or next(
                (a for a in arguments if isinstance(a, dist.ProcessGroup)), None
            )
            sent.append((name, given.numel(), str(given.dtype), dist.get_world_size(group)))
            return real[name](*arguments, **named)

        return called

    for name in _WATCHED:
        setattr(dist, name, replacement(name))
    try:
        yield sent
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def count(cases: list[dict[str, Any]], tokens: Path, answer: Path) -> None:
    """One rank's part: the second step's collectives by case, and the elements of the gradients that it holds."""
    from components.corpus.shards import TokenShards
    from components.pretraining.data.batches import BatchSource
    from components.pretraining.training.training_step import TrainingStep
    from tests.pretraining.test_dropping import build

    shards = TokenShards.open(tokens)
    streams = {name: shards.shard("train", name) for name in shards.categories("train")}
    found = []
    with watched() as sent:
        for values in cases:
            config = PretrainConfig.model_validate(values)
            engine, ranks = build(config)
            source = BatchSource(config, streams, shards.eos_id)
            groups = partial(source.rank_groups, rank=ranks.rank, world=ranks.world)
            training = TrainingStep(engine, config, groups, ranks)
            for step in range(2):
                sent.clear()
                training.gradients(step)
                in_gradients = list(sent)
                engine.step()
            elements = [sum(p.numel() for p in group) for group in engine.optimizer.bit16_groups]
            experts = [bool(group.get("moe")) for group in engine.optimizer.param_groups]
            found.append(
                {
                    "gradients": in_gradients,
                    "step": sent[len(in_gradients) :],
                    "held": elements,
                    "experts": experts,
                }
            )
    if ranks.is_first:
        answer.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # skip the tear-down of gloo, which waits for its peers


def main() -> None:
    """Gradients of one row each in bf16, as ranks of a two-layer model would have them, added up in several ways."""
    from components.pretraining.architecture import model_config
    from components.pretraining.deepspeed.initial_model import initial_model
    from components.pretraining.processes.ranks import Ranks
    from model import LoadBalance

    config = PretrainConfig.model_validate(step_config(1, 1, precision="bf16"))
    model = initial_model(config, model_config(config), Ranks(precision="bf16"))
    model.balance = LoadBalance()
    model.train()
    generator = torch.Generator().manual_seed(5)
    gradients = []
    for _ in range(_RANKS):
        ids_BT = torch.randint(0, 300, (1, CONTEXT), generator=generator)
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        model.balance.reset()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())
        model.zero_grad()
    for ranks in (4, 8, 32, _RANKS):
        rows_RP = torch.stack(gradients[:ranks])
        exact_P = rows_RP.double().sum(0)
        line = [f"{ranks:4} ranks"]
        for dtype in (torch.bfloat16, torch.float32):
            ring_P = rows_RP[0].to(dtype)
            for row_P in rows_RP[
                1:
            ]:  # a ring adds one rank's after another's, each time rounded for the wire
                ring_P = ring_P + row_P.to(dtype)
            tree_RP = rows_RP.to(dtype)
            while len(tree_RP) > 1:
                tree_RP = tree_RP[::2] + tree_RP[1::2]
            for name, sum_P in (("ring", ring_P), ("tree", tree_RP[0])):
                error = float((sum_P.double() - exact_P).norm() / exact_P.norm())
                line.append(f"{name} in {str(dtype).removeprefix('torch.')} {error:.1e}")
        print(", ".join(line))


if __name__ == "__main__":
    main()
