"""Muon below ZeRO against torch's Muon on whole matrices: one process, sharded experts, cut matrices, resumed runs."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from components.pretraining.config import PretrainConfig
from components.pretraining.deepspeed.muon import orthogonalised
from tests.pretraining.children import Children
from tests.pretraining.factory import BATCH, CONTEXT, MODEL, run_config
from tests.pretraining.mesh_job import _joined
from tests.pretraining.test_dropping import backward, build
from tests.pretraining.test_guard import weights
from tests.pretraining.test_launcher import run_ranks, write_request
from tests.pretraining.test_training import is_saved, lines, saved

RATE, DECAY, CLIP, MOMENTUM = 1e-2, 0.1, 0.5, 0.95


def muon_config(**values: Any) -> dict[str, Any]:
    optimizer = {"kind": "muon", "peak_lr": RATE, "warmup_steps": 4, "weight_decay": DECAY, "clip_norm": CLIP}
    return run_config(**{"optimizer": optimizer, "load_balance_counts": "exact", **values})


def whole_matrices(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a parameter as the official files have them, as views."""
    stack = tensor if tensor.ndim == 3 else tensor[None]
    return [part for matrix in stack for part in (matrix.chunk(2) if "gate_up" in name else (matrix,))]


def is_muons(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1 and "layers" in name and "router" not in name


def reference(config: PretrainConfig, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after ``steps`` in plain torch: torch.optim.Muon on every matrix by itself."""
    from components.pretraining.architecture import model_config
    from components.pretraining.deepspeed.initial_model import initial_model

    model = initial_model(config, model_config(config)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    muons = {n: p for n, p in model.named_parameters() if is_muons(n, p)}
    copies = {
        n: [torch.nn.Parameter(m.clone()) for m in whole_matrices(n, p.detach())] for n, p in muons.items()
    }
    muon = torch.optim.Muon(
        [matrix for parts in copies.values() for matrix in parts],
        lr=RATE, weight_decay=DECAY, momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    rest = {n: p for n, p in model.named_parameters() if n not in muons}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in rest.items() if "router" in n], "weight_decay": DECAY},
            {"params": [p for n, p in rest.items() if "router" not in n], "weight_decay": 0.0},
        ],
        lr=RATE, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step in range(steps):
        model.zero_grad()
        tokens = torch.randint(0, 300, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.balance.reset()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert norm > CLIP  # it bites
        for name, parts in copies.items():
            assert muons[name].grad is not None
            for part, gradient in zip(parts, whole_matrices(name, muons[name].grad), strict=True):
                part.grad = gradient
        muon.step()
        adamw.step()
        with torch.no_grad():
            for name, parts in copies.items():
                for view, part in zip(whole_matrices(name, muons[name]), parts, strict=True):
                    view.copy_(part)
    return before, {name: parameter.detach() for name, parameter in model.named_parameters()}


def take_steps(values: dict[str, Any], steps: int, answer: Path) -> None:
    """A rank: steps with the engine; the first one writes the weights down."""
    from deepspeed.utils import safe_get_full_fp32_param  # type: ignore[import-untyped]

    config = PretrainConfig.model_validate(values)
    engine, ranks = build(config)
    flats = [(g["params"][0].numel(), g["muon"]) for g in engine.optimizer.optimizer.param_groups]
    for step in range(steps):
        backward(engine, config, ranks, step)
        engine.step()
    found = _joined(engine, safe_get_full_fp32_param)
    if ranks.is_first:
        torch.save({"weights": found, "flats": flats}, answer)
    torch.distributed.barrier()
    os._exit(0)  # skip the tear-down of gloo, which waits for its peers


@pytest.mark.parametrize(
    ("world", "expert_parallel", "zero_stage"),
    [(2, 2, 2), *(pytest.param(*mesh, marks=pytest.mark.campaign) for mesh in ((1, 1, 1), (4, 2, 1)))],
)
def test_every_matrix_moves_as_torch_moves_it_whole(
    tmp_path: Path, children: Children, world: int, expert_parallel: int, zero_stage: int
) -> None:
    """One micro-step, since those of several are judged by the balance of other tokens than the reference's."""
    values = muon_config(
        sequences_per_micro_batch=BATCH // world, expert_parallel=expert_parallel, zero_stage=zero_stage,
        load_balance_coef=0.0,
    )  # fmt: skip
    path = tmp_path / "answer.pt"
    children.call_ranks(world, take_steps, values, 1, path)
    found = torch.load(path)
    before, after = reference(PretrainConfig.model_validate(values), 1)
    moved = 0
    for name, wanted in after.items():
        tolerance = 0.1 if is_muons(name, wanted) else 1e-3  # products in bfloat16 make noise of small values
        for now, then, start in zip(
            whole_matrices(name, found["weights"][name]), whole_matrices(name, wanted),
            whole_matrices(name, before[name]), strict=True,
        ):  # fmt: skip
            step, right = now - start, then - start
            assert (step - right).norm() <= tolerance * right.norm(), name
            if is_muons(name, wanted):
                direction = (now - start * (1 - RATE * DECAY)) / (0.2 * RATE * max(start.shape) ** 0.5)
                values_S = torch.linalg.svdvals(direction)
                assert values_S.max() < 1.3 and (values_S > 0.5).double().mean() > 0.6, name
                moved += 1
    assert moved == 2 * (4 + 4 * 3)  # layers x (attention + experts x (gate, up, down))


def test_a_matrix_that_a_boundary_cuts(tmp_path: Path, children: Children) -> None:
    """Of three layers half the elements end within a matrix, which must be put together first."""
    layout = [0, 1, 1]
    model = {**MODEL, "num_hidden_layers": 3, "rope_layout": layout, "sliding_window_layout": layout}
    values = muon_config(model={"preset": "nano", "overrides": model}, load_balance_coef=0.0)
    several, one = tmp_path / "2.pt", tmp_path / "1.pt"
    children.call_ranks(2, take_steps, values, 1, several)
    children.call_ranks(1, take_steps, values, 1, one)
    found, wanted = torch.load(several), torch.load(one)
    ((cut, _),) = [flat for flat in found["flats"] if flat[1]]
    muons = [(n, p) for n, p in wanted["weights"].items() if is_muons(n, p)]
    ends = torch.tensor([matrix.numel() for n, p in muons for matrix in whole_matrices(n, p)]).cumsum(0)
    assert 2 * cut >= ends[-1] > cut and cut not in ends
    for name, weight in wanted["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-3 * weight.norm(), name


def test_orthogonal_directions_have_the_size_of_adamws() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(24, 24), (16, 64), (64, 16)]
    matrices = [torch.randn(*shape, generator=generator) for shape in shapes]
    for matrix, direction in zip(matrices, orthogonalised(matrices), strict=True):
        values = torch.linalg.svdvals(direction / (0.2 * max(matrix.shape) ** 0.5))
        assert (values > 0.5).double().mean() > 0.9 and values.max() < 1.3
        assert 0.13 < direction.square().mean().sqrt() < 0.24
        assert (matrix * direction).sum() > 0  # the sign is the matrix's
    assert orthogonalised([]) == []


@pytest.fixture(scope="module")
def whole_muon(tmp_path_factory: pytest.TempPathFactory, tokens: Path, children: Children) -> Path:
    out = tmp_path_factory.mktemp("muon") / "out"
    children.run(tokens, out, muon_config())
    rows = [row["metrics"] for row in lines(out) if "train/ce" in row["metrics"]]
    assert rows[-1]["train/ce"] < 0.75 * rows[0]["train/ce"]
    return out


@pytest.mark.campaign
def test_a_killed_run_ends_in_the_same_bits(
    tmp_path: Path, tokens: Path, children: Children, whole_muon: Path
) -> None:
    out = tmp_path / "out"
    child = children.start(tokens, out, muon_config(), freeze_when=partial(is_saved, out, 20))
    child.await_frozen()
    child.kill()
    children.run(tokens, out, muon_config())
    assert lines(out) == lines(whole_muon) and weights(out, "stage3") == weights(whole_muon, "stage3")


@pytest.mark.campaign
def test_two_ranks_take_the_state_over(
    tmp_path: Path, tokens: Path, children: Children, whole_muon: Path
) -> None:
    out = tmp_path / "out"
    child = children.start(tokens, out, muon_config(), freeze_when=partial(is_saved, out, 20))
    child.await_frozen()
    child.kill()
    assert saved(out)[-1] == 20
    config = muon_config(processes=2, expert_parallel=2, zero_stage=2)
    request = out / ".work" / "request.json"
    request.write_text(write_request(tmp_path / "other", tokens, config).read_text().replace("other", "out"))
    codes, answer = run_ranks(children, request, 2)
    assert codes == [0, 0] and "error" not in answer
    for row, wanted in zip(lines(out), lines(whole_muon), strict=True):
        if "train/ce" in wanted["metrics"]:
            assert row["metrics"]["train/ce"] == pytest.approx(wanted["metrics"]["train/ce"], rel=0.01)
