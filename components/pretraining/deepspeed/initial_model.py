"""A fresh model, built on the device tensor by tensor: ``initial_model(config, architecture, ranks)``.

The model is built on the meta device, then each parameter is drawn on the device in the working dtype, of the experts
only this rank's, so that the host never holds more than a piece of one tensor beside the model. Every value
is a pure function of (seed, parameter, global index of the expert): the same on every mesh.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from components.pretraining.config import PretrainConfig
from components.pretraining.deepspeed.parameter_names import official_parameter
from components.pretraining.processes.ranks import ALONE, Ranks
from model import SmallThinkerConfig, SmallThinkerForCausalLM

_PIECE_ELEMENTS = 1 << 24  # drawn at a time on the host: 64 MiB


def _draw(target: Tensor, std: float, key: str) -> None:
    """Fill a contiguous ``target`` with normal(0, std), rounded to its dtype, from the stream that ``key`` names."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    flat = target.view(-1)
    for start in range(0, flat.numel(), _PIECE_ELEMENTS):
        count = min(_PIECE_ELEMENTS, flat.numel() - start)
        values = generator.standard_normal(count, dtype=np.float32)
        flat[start : start + count].copy_(torch.from_numpy(values).mul_(std))


def _fill(name: str, target: Tensor, std: float, seed: int, local: range) -> None:
    """Initial values of one parameter, as ``SmallThinkerPreTrainedModel._init_weights`` distributes them."""
    official = official_parameter(name)
    if official is None:
        target.zero_()
    elif target.ndim == 1:
        target.fill_(1.0)  # norms
    elif target.ndim == 2:
        _draw(target, std, f"{seed} {official}")
    else:
        for expert, matrix in zip(local, target, strict=True):
            _draw(matrix, std, f"{seed} {official} {expert}")


def model_on_meta(architecture: SmallThinkerConfig, ranks: Ranks = ALONE) -> SmallThinkerForCausalLM:
    """The model on the meta device, with this rank's experts only."""
    ranks.check_experts(architecture.moe_num_primary_experts)
    with torch.device("meta"):
        model = SmallThinkerForCausalLM(architecture)
    if ranks.expert_parallel > 1:
        from components.pretraining.deepspeed.expert_parallel import shard_experts

        shard_experts(model, ranks)
    model.tie_weights()
    return model


def allocate(model: SmallThinkerForCausalLM, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a model of :func:`model_on_meta` its parameters on ``device``; what they hold is undefined."""
    for name, parameter in list(model.named_parameters()):
        value = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
        value.__dict__.update(parameter.__dict__)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
    model.tie_weights()
    assert all(tensor.device.type != "meta" for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def initial_model(
    config: PretrainConfig, architecture: SmallThinkerConfig, ranks: Ranks = ALONE
) -> SmallThinkerForCausalLM:
    """A freshly initialised model; the same weights for the same seed, without touching torch's generator.

    Args:
        config: gives the seed.
        architecture: the model's.
        ranks: say where the parameters are made, their dtype, and which experts this rank holds.

    Raises:
        StageError: ``expert_parallel`` does not divide the processes or the experts.
    """
    model = model_on_meta(architecture, ranks)
    allocate(model, ranks.device, ranks.dtype)
    local = ranks.local_experts(architecture.moe_num_primary_experts)
    for name, parameter in model.named_parameters():
        _fill(name, parameter.data, architecture.initializer_range, config.seed, local)
    return model
