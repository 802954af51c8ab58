"""Every n-th layer is recomputed, no other runs again, and gradients stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from components.pretraining.architecture import model_config
from components.pretraining.config import PretrainConfig
from components.pretraining.deepspeed.engine import prepare_model
from components.pretraining.processes.ranks import Ranks
from model import SmallThinkerForCausalLM
from tests.pretraining.factory import CONTEXT, MODEL, VOCABULARY, run_config

LAYERS = 4


def config_of(**values: Any) -> PretrainConfig:
    layers = {"num_hidden_layers": LAYERS, "rope_layout": [0, 1] * 2, "sliding_window_layout": [0, 1] * 2}
    model = {"preset": "nano", "overrides": {**MODEL, **layers}}
    return PretrainConfig.model_validate(run_config(model=model, **values))


def runs_and_gradients(**values: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """How often each layer's attention runs in one forward and backward pass, and the gradients."""
    config = config_of(**values)
    torch.manual_seed(0)
    model = SmallThinkerForCausalLM(model_config(config)).train()
    prepare_model(model, config, Ranks(0, 1, torch.device("cpu")))
    runs: Counter[int] = Counter()
    for index, layer in enumerate(model.model.layers):

        def count(module: nn.Module, arguments: Any, index: int = index) -> None:
            runs[index] += 1

        layer.get_submodule("self_attn").register_forward_pre_hook(count)
    ids = torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [runs[index] for index in range(LAYERS)], gradients


@pytest.mark.parametrize(
    ("every", "expected_runs"), [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (3, [2, 1, 1, 2]), (9, [2, 1, 1, 1])]
)
def test_only_the_chosen_layers_run_again_and_gradients_stay(every: int, expected_runs: list[int]) -> None:
    once, expected = runs_and_gradients()
    assert once == [1, 1, 1, 1]
    values: dict[str, Any] = {"activation_checkpointing": True, "recompute_every": every}
    runs, gradients = runs_and_gradients(**values)
    assert runs == expected_runs
    assert config_of(**values).recomputed_layers(LAYERS) == runs.count(2)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-7), name
