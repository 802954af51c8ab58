"""The estimate of a run, what a machine lacks, and the paper's values in the presets."""

from __future__ import annotations

import pytest
import torch

from components.pretraining import estimate as estimating
from components.pretraining.architecture import model_config
from components.pretraining.config import HardwarePart, PretrainConfig
from components.pretraining.deepspeed.initial_model import initial_model
from components.pretraining.estimate import describe, estimate_run, memory_by_part, preflight
from components.pretraining.presets import (
    pretrain_config_4b,
    pretrain_config_21b,
    pretrain_config_smoke,
)
from tests.pretraining.factory import run_config


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(pretrain_config_4b(), "4,035,085,824"), (pretrain_config_21b(), "21,506,562,560")],
)
def test_described_parameters(config: PretrainConfig, parameters: str) -> None:
    text = describe(config)
    assert f"{config.model.preset}: {parameters} parameters" in text
    assert "problem" not in text
    for stage in ("stage1", "stage2", "stage3"):
        assert f"  {stage}: " in text


def test_the_count_is_that_of_a_real_model() -> None:
    config = PretrainConfig.model_validate(run_config())
    network = initial_model(config, model_config(config))
    counted = estimate_run(model_config(config), config)
    assert counted.parameters == sum(parameter.numel() for parameter in network.parameters())
    experts = sum(p.numel() for name, p in network.named_parameters() if "experts" in name)
    tables = sum(p.numel() for name, p in network.named_parameters() if "embed" in name or "lm_head" in name)
    assert experts > 0 and counted.active == counted.parameters - tables - experts // 2  # 2 of 4 experts act


@pytest.mark.parametrize(
    ("config", "horizon", "batch", "peak_lr", "context"),
    [
        (pretrain_config_4b(), 2.5e12, 1536, 3e-4, 32_768),
        (pretrain_config_21b(), 7.2e12, 4352, 4.2e-4, 16_384),
    ],
)
def test_values_of_the_paper(
    config: PretrainConfig, horizon: float, batch: int, peak_lr: float, context: int
) -> None:
    assert sum(stage.tokens for stage in config.stages) == pytest.approx(horizon, abs=3)
    assert [stage.sequences_per_step for stage in config.stages[:2]] == [batch, batch]
    assert [stage.context for stage in config.stages] == [4096, 4096, context]
    assert [stage.rope_theta for stage in config.stages] == [1e5, 1e5, 1.5e6]
    part = config.optimizer
    assert (part.peak_lr, part.final_lr_ratio, part.beta1, part.beta2, part.weight_decay) == (
        peak_lr, 0.1, 0.9, 0.95, 0.1,
    )  # fmt: skip
    assert model_config(config).max_position_embeddings >= context
    assert config.stages[2].mixture["sft"] > 0 == config.stages[0].mixture["sft"]


def test_memory_that_cannot_fit_is_a_problem() -> None:
    config = pretrain_config_21b()
    small = HardwarePart(gpus=256, gpu_memory_gb=24.0)
    assert estimate_run(model_config(config), config).problems == ()
    (problem,) = estimate_run(model_config(config), config, small).problems
    assert "GB per GPU are needed and 24 GB are there" in problem
    text = describe(config.model_copy(update={"hardware": small}))
    assert f"problem     {problem}" in text


def test_fewer_gpus_than_planned_go_on_with_the_same_batch() -> None:
    """One node of 32 is lost: 31 go on, in one micro-step more with some padding."""
    config = pretrain_config_21b()
    found = estimate_run(model_config(config), config, HardwarePart(gpus=248))
    assert found.problems == ()
    assert [(stage.micro_batch, stage.accumulation) for stage in found.stages] == [(1, 18), (1, 18), (1, 5)]
    assert found.stages[0].padding == pytest.approx(1 - 4352 / (18 * 248))
    assert "1 sequences x 18 micro-steps per process, 2.5% of it padding" in found.render()
    whole = estimate_run(model_config(config), config)
    assert [stage.padding for stage in whole.stages] == [0.0, 0.0, 0.0] and "padding" not in whole.render()


def test_more_processes_than_sequences_are_a_problem() -> None:
    config = pretrain_config_4b()
    (problem,) = estimate_run(model_config(config), config, HardwarePart(gpus=193)).problems
    assert (
        "stage3 is 192 sequences and there are 193 processes" in problem and "1 to 192 are allowed" in problem
    )


def test_more_gpus_need_fewer_days_and_less_memory() -> None:
    config = pretrain_config_21b()
    few, many = (estimate_run(model_config(config), config, HardwarePart(gpus=gpus)) for gpus in (64, 128))
    assert few.days == pytest.approx(2 * many.days) and few.flops == many.flops
    assert sum(few.memory_bytes.values()) > sum(many.memory_bytes.values())


def test_experts_are_shared_and_all_else_is_not() -> None:
    """Sums over a real model's tensors, by what each process of the mesh holds."""
    config = PretrainConfig.model_validate(run_config(precision="bf16", zero_stage=1))
    architecture = model_config(config)
    sizes = {name: p.numel() for name, p in initial_model(config, architecture).named_parameters()}
    experts = sum(size for name, size in sizes.items() if "experts" in name)
    dense = sum(sizes.values()) - experts
    processes, shared = 8, 4
    parallel = config.model_copy(update={"expert_parallel": shared})
    found = memory_by_part(architecture, parallel, processes)
    assert found["weights"] == 2 * (dense + experts / shared)
    # Sums of all that it holds in fp32, and its part of their mean or the largest tensor on its way there.
    part = dense / 8 + experts / shared / 2
    largest = sizes["model.embed_tokens.weight"]
    assert found["gradients"] == 4 * (dense + experts / shared) + max(2 * largest, 4 * part)
    # The experts' state is partitioned over the two processes that hold the same ones, the rest over all eight.
    assert found["master weights and moments"] == 12 * (dense / 8 + experts / shared / 2)
    alone = memory_by_part(architecture, config, processes)
    assert alone["weights"] == 2 * (dense + experts) and "all-to-all buffers" not in alone
    assert found["all-to-all buffers"] > 0 and found["activations"] > alone["activations"]
    partitioned = parallel.model_copy(update={"zero_stage": 2})
    # Its part in fp32 and the largest tensor's on its way there, two buckets in bf16 and what travels of one in fp32.
    assert memory_by_part(architecture, partitioned, processes)["gradients"] == (
        4 * (part + min(part, largest)) + (2 * 2 + 4) * (dense + experts / shared)
    )


def test_the_mesh_is_shown_and_an_impossible_one_is_a_problem() -> None:
    config = pretrain_config_21b()
    assert "256 processes, each expert on 32 of them (expert parallelism 8)" in describe(config)
    # 52 layers x 6 experts x 2560 bf16 numbers, 6 times, 7 of 8 to another process.
    assert estimate_run(model_config(config), config).exchanged_bytes == 52 * 6 * 2560 * 2 * 6 * 7 / 8
    assert "all-to-all  8.4 MB sent per token" in describe(config)
    assert "all-to-all" not in describe(pretrain_config_4b())
    for size, words in ((7, "number of processes, which is 256"), (128, "number of experts, which is 64")):
        wrong = config.model_copy(update={"expert_parallel": size})
        problems = estimate_run(model_config(wrong), wrong).problems
        assert any(
            f"expert_parallel is {size}; it must divide the {words}" in problem for problem in problems
        )


def test_a_model_that_does_not_fit_without_expert_parallelism() -> None:
    config = pretrain_config_21b()
    small = HardwarePart(gpus=256, gpu_memory_gb=48.0)
    assert estimate_run(model_config(config), config, small).problems == ()
    alone = config.model_copy(update={"expert_parallel": 1})
    (problem,) = estimate_run(model_config(alone), alone, small).problems
    assert "146 GB per GPU are needed and 48 GB are there" in problem


def test_preflight_names_missing_gpus() -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= 64:
        pytest.skip("this machine has the GPUs")
    problems = preflight(pretrain_config_4b())
    assert f"needs 64 GPUs with 80 GB; found {found}" in problems[0]
    assert preflight(pretrain_config_smoke()) == []


def test_preflight_asks_for_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (problem,) = preflight(pretrain_config_smoke().model_copy(update={"device": "cuda"}))
    assert "torch finds no CUDA device" in problem


def test_preflight_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = estimating.importlib.util.find_spec
    monkeypatch.setattr(
        estimating.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else real(name)
    )
    (problem,) = preflight(pretrain_config_smoke())
    assert "the Python package deepspeed is missing" in problem and "pip install" in problem


def test_groups_need_not_fit_the_mesh() -> None:
    config = pretrain_config_21b()
    hardware = config.hardware.model_copy(update={"gpus": 24})
    assert estimate_run(model_config(config), config, hardware).problems == ()
