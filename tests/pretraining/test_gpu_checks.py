"""The checks for a GPU, as far as a CPU can run them: they pass here, and they notice planted faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.pretraining.kernel_proofs import gpu_checks
from components.pretraining.kernel_proofs.gpu_checks import CHECKS, Outcome, Sizes
from components.pretraining.kernel_proofs.on_gpu import LIMITS_S, run_all, run_apart

from .test_kernels import needs_triton


@pytest.mark.parametrize("name", ["environment", "empty-groups", "router-logits", "copies", "collectives"])
def test_a_check_passes_on_the_cpu(name: str) -> None:
    outcome = CHECKS[name](Sizes.rehearsal())
    assert outcome.problems == [] and outcome.figures
    json.dumps(outcome.figures)


class _Unwritten(torch.autograd.Function):
    """What pytorch#172439 describes: the gradient of a group without rows is left as memory was."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ends_E,) = ctx.saved_tensors
        counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        return torch.where((counts_E == 0)[:, None, None], 0.5, grad), None


def test_unwritten_gradients_of_empty_groups_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.grouped_mm

    def spoiled(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return real(x, _Unwritten.apply(w, offs), offs=offs)

    monkeypatch.setattr(gpu_checks.F, "grouped_mm", spoiled)
    problems = CHECKS["empty-groups"](Sizes.rehearsal()).problems
    for case in ("first half", "last half", "every other", "all but one", "odd rows"):
        assert any(f"groups without rows: {case}: w is off" in problem for problem in problems)
    assert not any("rows: none" in problem for problem in problems)


def test_a_wrong_copy_and_a_wrong_sum_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    assert len(CHECKS["copies"](Sizes.rehearsal()).problems) == 2
    assert len(CHECKS["collectives"](Sizes.rehearsal()).problems) == 4


def test_errors_beyond_roundings_are_problems() -> None:
    outcome = Outcome()
    outcome.compare("x", {"a": 0.001, "b": 0.02, "c": float("nan")})
    assert [problem[:13] for problem in outcome.problems] == ["x: b is off b", "x: c is off b"]


def test_every_check_has_a_limit_and_a_gpu_has_eight_minutes() -> None:
    assert list(CHECKS) == list(LIMITS_S)
    assert all(0 < limit <= 240 for limit in LIMITS_S.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_check_that_ends_badly_or_late_is_a_verdict(tmp_path: Path) -> None:
    ended = run_apart("environment", rehearse=False, limit_s=300)
    assert ended["verdict"] == "error" and "need a GPU" in ended["problems"][0]
    # time is the subject: no interpreter starts within the limit
    late = run_apart("environment", rehearse=False, limit_s=0.01)
    assert late["verdict"] == "timed out"
    out = tmp_path / "results.json"
    # time is the subject: nothing may begin once the limit is used up
    results = run_all(["copies", "speed"], rehearse=False, limit_s=0.0, out=out)
    assert [result["verdict"] for result in results] == ["not run", "not run"]
    assert json.loads(out.read_text()) == results


def test_the_shapes_are_those_of_the_recipes() -> None:
    sizes = Sizes.gpu()
    kinds = {(case.tokens, case.window, case.heads, case.groups) for case in sizes.attention}
    assert {(4096, 4096, 28, 4), (4096, None, 28, 4), (16_384, 4096, 28, 4), (4096, None, 12, 2)} <= kinds
    assert [config.moe_num_primary_experts for config in sizes.experts] == [64, 32]


@needs_triton
@pytest.mark.campaign
def test_the_whole_rehearsal_passes() -> None:
    command = [sys.executable, "-m", "components.pretraining.kernel_proofs.on_gpu", "--rehearse"]
    done = subprocess.run([*command, "--limit-s", "3000"], stdout=subprocess.PIPE, text=True)
    results = json.loads(done.stdout)["results"]
    assert {result["check"]: result["verdict"] for result in results} == dict.fromkeys(LIMITS_S, "passed")
