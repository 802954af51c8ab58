"""Experts over several processes give what one process gives: gradients, norms, weights, counts, exports."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.artifacts import StageError
from components.pretraining.architecture import model_config
from components.pretraining.deepspeed.parameter_names import official_parameter
from components.pretraining.processes.ranks import Ranks
from tests.pretraining.children import Children
from tests.pretraining.mesh_job import (
    EXPERTS,
    STEPS,
    Case,
    build,
    config_of,
    export_memory,
    layout_of,
    reference,
    work,
)

TOLERANCE = 1e-6
PER_MICRO_STEP = (
    "ce",
    "load_balance",
    "router_z",
    "router_entropy",
    "mean_scores",
    "groups",
    "group_load_max",
)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


@cache
def wanted(precision: str, routing: str) -> dict[str, Any]:
    return reference(Case(precision=precision, routing=routing))


def run(children: Children, folder: Path, *cases: Case) -> list[dict[str, Any]]:
    """The cases, one after the other on one set of ranks."""
    (world,) = {case.world for case in cases}
    children.call_ranks(world, work, list(cases), folder)
    answers: list[dict[str, Any]] = torch.load(folder / "answers.pt", weights_only=False)
    assert len(answers) == len(cases)
    return answers


def assert_equals_one_process(case: Case, answer: dict[str, Any]) -> None:
    one = wanted(case.precision, case.routing)
    for step in range(STEPS):
        found = answer["gradients"][step]
        assert found.keys() == one["gradients"][step].keys()
        for name, gradient in one["gradients"][step].items():
            assert distance(found[name], gradient) < TOLERANCE, (case, step, name)
        assert answer["norms"][step] == pytest.approx(one["norms"][step], rel=TOLERANCE), (case, step)
        assert one["norms"][step] > 5 * 0.1  # the norm that is clipped to: it bites
    assert answer["parameters"].keys() == one["parameters"].keys()
    for name, parameter in one["parameters"].items():
        assert distance(answer["parameters"][name], parameter) < TOLERANCE, (case, name)
    assert torch.equal(answer["padded"], one["padded"]), case
    slices = layout_of(model_config(config_of(case))).slices
    for found, expected in zip(answer["meters"], one["meters"], strict=True):
        for name, at in slices.items():
            if name == "micro_steps":
                assert float(found[at]) == case.world * float(expected[at])
            elif name in PER_MICRO_STEP:
                assert distance(found[at] / case.world, expected[at]) < TOLERANCE, (case, name)
            elif name == "nats_by_category":
                assert distance(found[at], expected[at]) < TOLERANCE, (case, name)
            else:  # counts
                assert torch.equal(found[at], expected[at]), (case, name)


def assert_exports_are_those_of_a_whole_model(answer: dict[str, Any]) -> None:
    for dtype, files in answer["exports"].items():
        assert sum(name.endswith(".safetensors") for name in files) > 5, (dtype, files)
        assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= files.keys()
        assert all(files.values()), (dtype, files)


def test_two_ranks_that_share_the_experts(tmp_path: Path, children: Children) -> None:
    cases = (
        Case(2, 2, zero_stage=1),
        Case(2, 2, zero_stage=1, stop_after=2),
        Case(2, 2, zero_stage=2, checkpointing=True, routing="skewed"),
        Case(2, 2, zero_stage=2, precision="bf16"),
    )
    answers = run(children, tmp_path, *cases)
    for case, answer in zip(cases, answers, strict=True):
        if case.precision == "fp32":
            assert_equals_one_process(case, answer)
        assert_exports_are_those_of_a_whole_model(answer)
    whole, resumed, skewed, low = answers
    for name, parameter in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], parameter), name
    counts = skewed["meters"][0][layout_of(model_config(config_of(cases[2]))).slices["expert_counts"]]
    assert (
        counts.view(-1, EXPERTS)[0, 4:].sum() == 0
    )  # the second rank's experts got no row in the first layer
    assert_bf16_follows_fp32(low)


def assert_bf16_follows_fp32(answer: dict[str, Any]) -> None:
    """fp32 master weights that move as a fp32 run from the same rounded weights moves them."""
    one = wanted("bf16", "even")
    assert answer["norms"] == pytest.approx(one["norms"], rel=2e-2)
    for name, parameter in one["parameters"].items():
        found = answer["parameters"][name]
        assert found.dtype == torch.float32 and distance(found, parameter) < 2e-2, name
    assert any(not torch.equal(p, p.to(torch.bfloat16).float()) for p in answer["parameters"].values())


def test_four_ranks_in_two_groups(tmp_path: Path, children: Children) -> None:
    case = Case(4, 2, zero_stage=2, checkpointing=True)
    (answer,) = run(children, tmp_path, case)
    assert_equals_one_process(case, answer)
    assert_exports_are_those_of_a_whole_model(answer)


@pytest.mark.campaign
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("routing", ["even", "skewed"])
def test_every_mesh(tmp_path: Path, children: Children, world: int, routing: str) -> None:
    """Ten minutes for all: every size of group, ZeRO stage, with and without recomputing, stopped or not."""
    cases = [
        Case(world, size, zero_stage, checkpointing, "fp32", routing, stop_after)
        for size in (1, 2, 4)
        if size <= world
        for zero_stage in (1, 2)
        for checkpointing in (False, True)
        for stop_after in (0, 1)
    ]
    for case, answer in zip(cases, run(children, tmp_path, *cases), strict=True):
        assert_equals_one_process(case, answer)
        assert_exports_are_those_of_a_whole_model(answer)


@pytest.mark.campaign
@pytest.mark.parametrize("world", [2, 4])
def test_every_mesh_in_bf16(tmp_path: Path, children: Children, world: int) -> None:
    cases = [
        Case(world, size, zero_stage, checkpointing=True, precision="bf16")
        for size in (1, 2, 4)
        if size <= world
        for zero_stage in (1, 2)
    ]
    for answer in run(children, tmp_path, *cases):
        assert_bf16_follows_fp32(answer)
        assert_exports_are_those_of_a_whole_model(answer)


@pytest.mark.campaign
@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_an_export_holds_one_file(tmp_path: Path, children: Children, expert_parallel: int) -> None:
    """Files of at most 30 MB: the first rank needs one in memory, twice where it is written; the other nothing."""
    children.call_ranks(2, export_memory, Case(2, expert_parallel), tmp_path, 30_000_000)
    written = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert written > 400e6
    first, second = (int((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert first < 90e6 and second < 15e6


def test_building(tmp_path: Path, children: Children) -> None:
    """The same initial values on every mesh, of the right distribution, within the memory of the model itself."""
    path = tmp_path / "built.pt"
    children.call_ranks(1, build, path)
    built = torch.load(path, weights_only=False)
    assert built["bf16 is fp32 rounded"] and all(built["bf16 is fp32 rounded"])
    one = built["ep 1"]
    for size in (2, 4):
        assert built[f"ep {size}"].keys() == one.keys()
        for name, value in built[f"ep {size}"].items():
            assert torch.equal(value, one[name]), (size, name)
    seen: set[float] = set()
    for name, value in one.items():
        if value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value)), name
            continue
        assert float(value.mean()) == pytest.approx(0, abs=4 * 0.05 / value.numel() ** 0.5), name
        assert float(value.std()) == pytest.approx(0.05, rel=4 / (2 * value.numel()) ** 0.5), name
        for matrix in value if value.ndim == 3 else value[None]:
            first = float(matrix.flatten()[0])
            assert first not in seen, f"{name} repeats the values of another tensor"
            seen.add(first)
    assert built["model_bytes"] > 200e6
    assert built["peak_bytes"] < built["model_bytes"] + 120e6  # a piece of 67 MB, drawn and scaled in place


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (
            Ranks(0, 6, expert_parallel=4),
            "expert_parallel is 4; it must divide the number of processes, which is 6",
        ),
        (
            Ranks(0, 6, expert_parallel=3),
            "it must divide the number of experts, which is 8, so it can be 1, 2, 4, 8.",
        ),
    ],
)
def test_meshes_that_cannot_be(ranks: Ranks, words: str) -> None:
    with pytest.raises(StageError, match=words):
        ranks.check_experts(8)


def test_every_expert_is_in_one_place_of_a_group() -> None:
    for rank in range(8):
        assert list(Ranks(rank, 8, expert_parallel=4).local_experts(8)) == [
            2 * (rank % 4),
            2 * (rank % 4) + 1,
        ]
    assert official_parameter("a.experts.experts.w1") == "a.experts.gate_up_proj"
    assert official_parameter("a.experts.experts.w2") == "a.experts.down_proj"
    assert official_parameter("a.experts.experts.w3") is None
    assert official_parameter("a.experts.down_proj") == "a.experts.down_proj"
