"""Balance by a bias: its steps and end, a run that it balances, and the same bias on every rank and after a kill."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from components.pretraining.training.balance_bias import BalanceBias
from model import SmallThinkerForCausalLM
from tests.model.factory import tiny
from tests.pretraining.children import Children
from tests.pretraining.factory import run_config
from tests.pretraining.test_guard import weights
from tests.pretraining.test_launcher import run_ranks, write_request
from tests.pretraining.test_training import is_saved, lines, saved


def biased(**values: Any) -> dict[str, Any]:
    """No balance loss. The rate is large, since the run is short."""
    return run_config(
        load_balance_coef=0.0, load_balance_bias_rate=0.02, load_balance_counts="exact", **values
    )


def applied(bias: BalanceBias, model: SmallThinkerForCausalLM, step: int) -> torch.Tensor:
    bias.apply(model, step)
    assert model.model.choice_bias_LE is not None
    return model.model.choice_bias_LE


def test_the_sign_of_the_error_moves_the_bias_and_it_fades_to_nothing() -> None:
    bias, model = BalanceBias(0.25, 0.4, 10), tiny()
    bias.apply(model, 0)
    assert model.model.choice_bias_LE is None  # nothing is known yet
    bias.update(torch.tensor([[4, 0, 2, 2], [1, 1, 1, 5]]))
    first = torch.tensor([[-0.25, 0.25, 0, 0], [0.25, 0.25, 0.25, -0.25]])
    assert torch.equal(applied(bias, model, 1), first)
    bias.update(torch.tensor([[0, 8, 0, 0], [2, 2, 2, 2]]))
    both = first + torch.tensor([[0.25, -0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]])
    resumed = BalanceBias(0.25, 0.4, 10)
    resumed.load_state(json.loads(json.dumps(bias.to_state())))
    for one in (bias, resumed):
        assert [one.strength(step) for step in range(10)] == [1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
        assert torch.equal(applied(one, model, 5), both) and torch.equal(applied(one, model, 7), both / 2)
        assert not applied(one, model, 9).any()
    none = BalanceBias(0.0, 0.4, 10)
    none.update(torch.tensor([[4, 0, 2, 2]]))
    assert none.to_state() is None
    none.load_state(bias.to_state())  # a run whose rate was set to 0: no bias stays behind
    assert none.to_state() is None


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory, tokens: Path, children: Children) -> Path:
    out = tmp_path_factory.mktemp("biased") / "out"
    children.run(tokens, out, biased())
    return out


def unevenness(out: Path, steps: range) -> float:
    """Mean over log lines of the emptiest expert's load."""
    rows = [row["metrics"] for row in lines(out) if row["step"] in steps and "train/ce" in row["metrics"]]
    return sum(row["router/load_min"] for row in rows) / len(rows)


@pytest.mark.campaign
def test_a_bias_alone_balances(tmp_path: Path, tokens: Path, children: Children, balanced: Path) -> None:
    children.run(tokens, tmp_path / "without", {**biased(), "load_balance_bias_rate": 0.0})
    assert unevenness(balanced, range(15, 31)) > unevenness(tmp_path / "without", range(15, 31)) + 0.1


def test_a_killed_run_chooses_alike(tmp_path: Path, tokens: Path, children: Children, balanced: Path) -> None:
    out = tmp_path / "out"
    child = children.start(tokens, out, biased(), freeze_when=partial(is_saved, out, 20))
    child.await_frozen()
    child.kill()
    children.run(tokens, out, biased())
    assert lines(out) == lines(balanced) and weights(out, "stage3") == weights(balanced, "stage3")


@pytest.mark.campaign
def test_two_ranks_that_share_experts_choose_like_one(
    tmp_path: Path, tokens: Path, children: Children, balanced: Path
) -> None:
    """From a checkpoint of one process at that: the bias comes along when the state is carried over."""
    out = tmp_path / "out"
    child = children.start(tokens, out, biased(), freeze_when=partial(is_saved, out, 20))
    child.await_frozen()
    child.kill()
    assert saved(out)[-1] == 20
    config = biased(processes=2, expert_parallel=2, zero_stage=2)
    request = out / ".work" / "request.json"
    request.write_text(write_request(tmp_path / "other", tokens, config).read_text().replace("other", "out"))
    codes, answer = run_ranks(children, request, 2)
    assert codes == [0, 0] and "error" not in answer
    rows = zip(lines(out), lines(balanced), strict=True)
    for row, wanted in rows:
        for name in ("train/ce", "router/load_min", "router/load_max"):
            if name in wanted["metrics"]:
                assert row["metrics"][name] == pytest.approx(wanted["metrics"][name], rel=0.02), (
                    row["step"],
                    name,
                )
