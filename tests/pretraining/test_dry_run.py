"""A step on fake CUDA tensors: what it counts, and that it notices what would slow down or break a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from components.pretraining.architecture import model_config
from components.pretraining.dry_run.fused_regions import written_nodes
from components.pretraining.dry_run.step_ledger import extent_bytes, operator_bytes, operator_flops
from components.pretraining.presets import PRESETS
from model.accounting import layer_parameters


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs, in one process of their own, with the helper compiled anew."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.pretraining.dry_job"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _rounded(count: int, width_bytes: int = 4) -> int:
    return -(-count * width_bytes // 512) * 512


def test_memory_flops_and_bytes_of_a_toy_are_those_counted_by_hand(job: dict[str, Any]) -> None:
    toy = job["toy"]
    a, b, y = _rounded(100 * 1000), _rounded(1000 * 50), _rounded(100 * 50)
    assert toy["live"] == a + b + y  # y itself was freed, z has its size
    # Backward: the sum (512 bytes), its gradient, which is expanded and not copied, and a's gradient.
    assert toy["peak"] in range(2 * a + b + y, 2 * a + b + 2 * y + 4 * 512)
    assert toy["weights"] == b
    assert toy["left"] == 0
    assert toy["flops"] == 2 * 2 * 100 * 1000 * 50
    product = toy["product"]
    assert product["moved_bytes"] == 4 * (100 * 1000 + 1000 * 50 + 100 * 50)
    assert product["bound_s"] == pytest.approx(max(product["flops"], product["moved_bytes"]) / 1e12)


def test_products_of_a_step_are_those_of_the_formula(job: dict[str, Any]) -> None:
    config = PRESETS["smoke"]()
    model, result = model_config(config), job["plain"]
    part, layers, top_k = (
        layer_parameters(model),
        result["layers"],
        model.moe_num_active_primary_experts,
    )
    rows = result["micro_batch"] * result["context"]
    matrices = layers * (part["attention"] + part["router"] + top_k * part["expert"])
    head = model.vocab_size * model.hidden_size
    # The loss leaves out each row's last token; the model applies the output matrix to it once, forward only.
    expected = 6 * rows * matrices + (6 * (rows - result["micro_batch"]) + 2 * result["micro_batch"]) * head
    products = sum(o["flops"] for o in result["operators"] if "flex" not in o["operator"])
    assert products == expected


def test_attention_runs_in_blocks_and_nothing_is_quadratic(job: dict[str, Any]) -> None:
    for name in ("plain", "recipe"):
        operators = {(o["operator"], o["phase"]) for o in job[name]["operators"]}
        assert {("flex_attention", "forward"), ("flex_attention_backward", "backward")} <= operators
        assert not any("scaled_dot" in operator for operator, _ in operators)
        assert ("_grouped_mm", "backward") in operators


def test_recomputation_appears_only_when_asked_for(job: dict[str, Any]) -> None:
    again = {
        name: [o for o in job[name]["operators"] if o["phase"] == "recomputation"]
        for name in ("plain", "recipe")
    }
    assert not again["plain"] and any(o["operator"] == "_grouped_mm" for o in again["recipe"])
    kernels = {o["phase"]: o["kernels"] for o in job["recipe"]["operators"] if o["operator"] == "_grouped_mm"}
    assert kernels == {"forward": 4, "recomputation": 4, "backward": 8}  # 2 layers, 2 products


def test_the_optimizers_state_is_shared_out(job: dict[str, Any]) -> None:
    parameters = job["plain"]["peak_by_kind"]["weights"] / 2
    state = "master weights and moments"
    assert job["plain"]["peak_by_kind"][state] == pytest.approx(12 * parameters, rel=0.02)
    assert job["recipe"]["peak_by_kind"][state] == pytest.approx(3 * parameters, rel=0.02)


def test_gradients_are_summed_in_fp32_by_part(job: dict[str, Any]) -> None:
    whole = job["plain"]["peak_by_kind"]  # ZeRO-1: the sums of all weights
    assert whole["gradients"] == pytest.approx(4 * whole["weights"] / 2, rel=0.02)
    kinds = job["recipe"]["peak_by_kind"]  # ZeRO-2 on four processes
    buckets = 2 * 2 * 500_000_000
    assert kinds["gradients"] - buckets == pytest.approx(4 * kinds["weights"] / 2 / 4, rel=0.02)


def test_a_step_never_waits_for_the_gpu_nor_compiles_again(job: dict[str, Any]) -> None:
    for name in ("plain", "recipe"):
        assert job[name]["host_waits"] == {}
        assert job[name]["compiled_again"] == 0
    # attention, norms, six passes of the experts, the loss
    assert job["recipe"]["graphs"] > job["plain"]["graphs"] > 0


def test_what_would_wait_is_caught(job: dict[str, Any]) -> None:
    assert job["item"] == "DataDependentOutputException"
    assert sum(job["waiting"].values()) >= 1 and "dry_job.py" in next(iter(job["waiting"]))


def test_a_graph_break_is_caught(job: dict[str, Any]) -> None:
    assert job["break"] in ("Unsupported", "UserError")


def test_the_products_own_checks_apply(job: dict[str, Any]) -> None:
    assert "multiple of 16 bytes" in job["misaligned"]


@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_attention_counts_the_pairs_in_view(window: int | None) -> None:
    tokens = 33
    pairs = sum(1 for q in range(tokens) for k in range(q + 1) if window is None or q - k < window)
    q = torch.empty(2, 3, tokens, 5)
    assert operator_flops("flex_attention", (q,), window) == 4 * 2 * 3 * 5 * pairs
    assert operator_flops("flex_attention_backward", (q,), window) == 10 * 2 * 3 * 5 * pairs


def test_bytes_of_gathers_scatters_and_expanded_tensors() -> None:
    table, index = torch.empty(1000, 8), torch.zeros(3, dtype=torch.int64)
    assert extent_bytes(torch.empty(1, 8).expand(100, 8)) == 32
    assert operator_bytes("index_select", (table, 0, index), {}, table.index_select(0, index)) == 2 * 96 + 24
    rows = torch.empty(3, 8)
    assert operator_bytes("index_add_", (table, 0, index, rows), {}, table) == 2 * 96 + 24 + 96
    assert operator_bytes("zero_", (table,), {}, table) == 32_000
    assert operator_bytes("add", (table, table), {}, table.clone()) == 2 * 32_000


def test_only_what_a_kernel_or_the_caller_reads_is_written() -> None:
    def chain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.mm((torch.relu(torch.ops.aten.mm(a, b)) * 2.0).t(), b) + 1.0

    graph = fx.experimental.proxy_tensor.make_fx(chain)(torch.ones(4, 4), torch.ones(4, 4)).graph
    names = [node.name for node in graph.nodes if node in written_nodes(graph) and node.op == "call_function"]
    assert names == ["mm", "mul", "t", "mm_1", "add"]
