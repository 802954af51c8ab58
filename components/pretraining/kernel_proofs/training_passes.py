"""All passes of a recipe that compile something, in the order of its run, over fake CUDA tensors: ``run_passes(...)``.

Held-out evaluation, micro-steps and evaluation again of each training stage at its shapes, with the first layers of
each kind, and the experts of one rank under expert parallelism, whose number of rows changes from step to step. One
process, nothing is sent. Only after ``load_fake_cuda()``.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from components.pretraining.architecture import model_config
from components.pretraining.config import PretrainConfig
from components.pretraining.data.batches import MicroBatch
from components.pretraining.deepspeed.engine import prepare_model
from components.pretraining.deepspeed.initial_model import allocate, model_on_meta
from components.pretraining.kernel_proofs.lowering import Collected, lowering_backend
from components.pretraining.kernel_proofs.targets import Target
from components.pretraining.presets import PRESETS
from components.pretraining.processes.ranks import Ranks
from components.pretraining.training.head_loss import fused_token_losses
from components.pretraining.training.training_step import TrainingStep
from model.compiling import set_compile_backend
from model.experts import Experts


class _Engine:
    """As much of DeepSpeed's engine as a micro-step touches; the optimizer compiles nothing."""

    def __init__(self, model: Any) -> None:
        self.module = model

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: Any) -> None:
        """Gradients of one micro-step."""
        loss.backward()


def kinds_of_layers(config: PretrainConfig) -> int:
    """How many of the first layers hold every kind (window or not, RoPE or not) that the model has."""
    architecture = model_config(config)
    assert architecture.rope_layout is not None and architecture.sliding_window_layout is not None
    layers = list(zip(architecture.rope_layout, architecture.sliding_window_layout, strict=True))
    return max(layers.index(kind) for kind in set(layers)) + 1


def single_process(recipe: str) -> PretrainConfig:
    """A recipe's training with as few layers as hold every kind, on one GPU."""
    config = PRESETS[recipe]()
    layers = kinds_of_layers(config)
    overrides = {**config.model.overrides, "num_hidden_layers": layers}
    architecture = model_config(config)
    for layout in ("rope_layout", "sliding_window_layout"):
        overrides[layout] = list(getattr(architecture, layout))[:layers]
    changes = {
        "model": {"preset": config.model.preset, "overrides": overrides},
        "expert_parallel": 1,
        "load_balance_groups": 1,
        "processes": 1,
        "device": "cuda",
        "precision": "bf16",
        "compile_layers": True,
        "hardware": {**config.hardware.model_dump(), "gpus": 0},
    }
    return PretrainConfig.model_validate({**config.model_dump(), **changes})


def _ids(batch: int, context: int) -> torch.Tensor:
    return torch.zeros(batch, context, dtype=torch.int64)


@torch.no_grad()
def _evaluate(model: Any, config: PretrainConfig, stage: int) -> None:
    """Held-out evaluation's forward passes: full batches of windows, and a last one with fewer."""
    model.eval()
    context, batch = config.stages[stage].context, config.evaluation.sequences_per_batch
    for windows in dict.fromkeys((batch, 1)):
        ids_BT = _ids(windows, context).to("cuda")
        out = model(
            input_ids=ids_BT,
            document_ids=ids_BT,
            padded=False,
            use_cache=False,
            logits_to_keep=1,
            output_hidden_states=True,
        )
        fused_token_losses(out.hidden_states[-1], model.lm_head.weight, ids_BT, config.loss_chunk_tokens)


def _micro_step(step: TrainingStep, model: Any, config: PretrainConfig, stage: int) -> None:
    model.train()
    ids_BT = _ids(config.micro_batch(stage), config.stages[stage].context)
    step.micro_step(MicroBatch(ids_BT, ids_BT, ids_BT, torch.zeros(len(ids_BT), dtype=torch.int64)))


def _local_experts(recipe: str, config: PretrainConfig, rows: int) -> None:
    """One rank's experts for ``rows`` rows of the whole group, each with its only expert, as AutoEP hands them over."""
    architecture = model_config(config)
    size = PRESETS[recipe]().expert_parallel
    architecture.moe_num_primary_experts //= size
    with torch.device("meta"):
        experts = Experts(architecture)
    for name, parameter in list(experts.named_parameters()):
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        setattr(experts, name, torch.nn.Parameter(value))
    m_SD = torch.empty(
        rows, architecture.hidden_size, dtype=torch.bfloat16, device="cuda", requires_grad=True
    )
    experts_S1 = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
    out_SD, _ = experts(m_SD, m_SD.new_ones(rows, 1), experts_S1, experts_S1[:, 0] == 0)
    out_SD.sum().backward()


def run_passes(recipe: str, target: Target) -> Collected:
    """Run what a run of ``recipe`` compiles, and return the kernels that Inductor writes for ``target``.

    Args:
        recipe: its name.
        target: the GPU.
    """
    config, collected = single_process(recipe), Collected()
    ranks = Ranks(device=torch.device("cuda", 0), precision="bf16")
    architecture = model_config(config)
    model = model_on_meta(architecture)
    # Every variant shall be compiled; whether a run may compile so many is the dry run's matter.
    with FakeTensorMode() as fake_mode, torch._dynamo.config.patch(recompile_limit=1000):
        set_compile_backend(lowering_backend(collected, target, fake_mode), fullgraph=True)
        allocate(model, ranks.device, ranks.dtype)
        prepare_model(model, config, ranks)
        source: Any = None  # batches are made here
        step = TrainingStep(_Engine(model), config, source, ranks)
        shapes: set[tuple[int, int]] = set()
        for number, stage in enumerate(config.stages):
            shape = config.micro_batch(number), stage.context
            if shape in shapes:
                continue  # the same kernels as of an earlier training stage
            shapes.add(shape)
            collected.moment = f"evaluation, stage {number + 1}"
            _evaluate(model, config, number)
            collected.moment = f"training, stage {number + 1}"
            _micro_step(step, model, config, number)
        if PRESETS[recipe]().expert_parallel > 1:
            collected.moment = "experts of one rank"
            rows = config.micro_batch(0) * config.stages[0].context
            rows *= architecture.moe_num_active_primary_experts
            for count in (rows, rows + 1, 1):
                _local_experts(recipe, config, count)
    return collected
