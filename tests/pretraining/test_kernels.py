"""The CUDA path's kernels, which no GPU of ours has run: compiled for GPUs, and run in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from components.pretraining.kernel_proofs.agreement import beyond_tolerance, relative_errors
from components.pretraining.kernel_proofs.compile import faults, limits_exceeded
from components.pretraining.kernel_proofs.targets import TARGETS

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="the package triton is not installed; the extra 'dev' has it"
)


def _dtype(case: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in case or "bfloat16" in case else torch.float32


def _run(chosen: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretraining.kernel_job", chosen], stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, "see above"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return _run("default")


CASES = (
    "attention fp32",
    "attention bf16",
    "experts fp32, some without rows",
    "experts bf16, some without rows",
    "experts bf16, one with all rows",
    "experts fp32, no rows at all",
    "loss fp32",
    "loss bf16",
    "micro-step bf16",
)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_reference(interpreted: dict[str, Any], case: str) -> None:
    errors = interpreted["errors"][case]
    assert len(errors) >= 3 and not beyond_tolerance(errors, _dtype(case))


@needs_triton
def test_a_window_off_by_one_is_noticed(interpreted: dict[str, Any]) -> None:
    errors = interpreted["errors"]["attention bf16, wrong window"]
    assert set(beyond_tolerance(errors, torch.bfloat16)) == {"out", "q", "k", "v"}


@needs_triton
def test_every_kind_of_kernel_ran(interpreted: dict[str, Any]) -> None:
    ran = " ".join(interpreted["kernels"])
    for part in ("flex_attention", "flex_attention_backward", "logsumexp", "rsqrt", "relu", "index"):
        assert part in ran


@needs_triton
@pytest.mark.campaign
def test_the_whole_matrix_agrees() -> None:
    errors = _run("matrix")["errors"]
    assert len(errors) > 200
    beyond = {case: beyond_tolerance(found, _dtype(case)) for case, found in errors.items()}
    assert not {case: found for case, found in beyond.items() if found}


def test_an_error_is_relative_and_nan_is_beyond_tolerance() -> None:
    right = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    errors = relative_errors({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 0.25])}, right)
    assert errors == {"a": pytest.approx(0.1), "b": pytest.approx(0.25)}
    assert set(beyond_tolerance({"a": float("nan"), "b": 1e-9}, torch.float32)) == {"a"}
    with pytest.raises(ValueError, match="names must be the same"):
        relative_errors({"a": right["a"]}, right)


@needs_triton
@pytest.mark.campaign
@pytest.mark.parametrize("recipe", ["smoke", "21b-slim", "4b", "21b"])
def test_every_kernel_of_a_recipe_compiles(recipe: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "components.pretraining.kernel_proofs.compile", "--recipe", recipe],
        stdout=subprocess.PIPE,
        text=True,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["faults"] == []
    for target in report["targets"]:
        made = {kernel["moment"].partition(",")[0]: 0 for kernel in target["kernels"]}
        assert {"evaluation", "training"} <= set(made)
        assert all(entry["cubin_bytes"] for kernel in target["kernels"] for entry in kernel["configs"])


def _entry(**values: Any) -> dict[str, Any]:
    fitting = {
        "warps": 8,
        "shared_bytes": 166_400,
        "tensor_columns": 0,
        "registers": 255,
        "cubin_bytes": 1,
    }
    return {**fitting, **values}


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({}, None),
        ({"shared_bytes": 232_448}, None),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory a block, of at most 232448"),
        ({"registers": 256}, "256 registers a thread, of at most 255"),
        ({"warps": 16, "registers": 255}, "130560 registers a block, of at most 65536"),
        ({"warps": 33, "registers": 32}, "1056 threads a block, of at most 1024"),
        ({"cubin_bytes": 0}, "no machine code was made"),
        ({"tensor_columns": 128}, "128 columns of tensor memory a block, of at most 0"),
    ],
)
def test_what_cannot_be_launched_is_named(values: dict[str, Any], fault: str | None) -> None:
    assert limits_exceeded(_entry(**values), TARGETS["h100"]) == ([fault] if fault else [])


def test_a_kernel_without_machine_code_is_a_fault() -> None:
    entry = {**_entry(), "faults": []}
    kernels = [
        {"kernel": "a", "moment": "training, stage 1", "configs": [entry], "error": ""},
        {"kernel": "b", "moment": "training, stage 1", "configs": [], "error": "PTXASError: no"},
        {"kernel": "c", "moment": "training, stage 3", "configs": [], "error": ""},
        {
            "kernel": "d",
            "moment": "training, stage 3",
            "configs": [{**entry, "faults": ["too much"]}],
            "error": "",
        },
    ]
    assert faults({"kernels": kernels}) == [
        "b (training, stage 1): PTXASError: no",
        "c (training, stage 3): no configuration",
        "d (training, stage 3): too much",
    ]
