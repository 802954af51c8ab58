"""``python -m flows.pretrain``: the plan before any spending, and what is refused."""

from __future__ import annotations

import json

import pytest

from flows.pretrain import main
from flows.recipes import RECIPES


def test_the_plan_of_the_full_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "21b", "--plan"]) == 0
    out, err = capsys.readouterr()
    for words in ("21,506,562,560 parameters", "mesh", "GB per GPU", "17,825,792 tokens", "days at 30%"):
        assert words in out
    assert "this machine: needs 256 GPUs" in err or not err


def test_what_cannot_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "21b", "--plan", "--set", "pretrain.hardware.gpu_memory_gb=24"]) == 2
    out, err = capsys.readouterr()
    assert "GB of 24 GB per GPU" in out  # the plan is shown, and then refused
    assert "error: refused" in err and "24 GB are there" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "22b"], "no recipe is called '22b'"),
        (["--mfu", "1.5"], "pretrain.hardware.assumed_mfu = 1.5"),
        (["--set", "pretrain.sede=1"], "no field 'pretrain.sede'"),
    ],
)
def test_wrong_values_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--plan"]) == 2
    assert words in capsys.readouterr().err


def test_days_follow_the_utilisation(capsys: pytest.CaptureFixture[str]) -> None:
    days = []
    for share in ("0.2", "0.4"):
        assert main(["--recipe", "4b", "--plan", "--mfu", share]) == 0
        line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("compute"))
        days.append(float(line.split(";")[1].split()[0]))
    assert days[0] == pytest.approx(2 * days[1], rel=0.02)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_deepspeed_config_is_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", name, "--deepspeed"]) == 0
    values = json.loads(capsys.readouterr().out)
    config = RECIPES[name]().pretrain
    assert values["bf16"]["enabled"] == (config.precision == "bf16")
    assert values["train_batch_size"] == (
        values["train_micro_batch_size_per_gpu"]
        * values["gradient_accumulation_steps"]
        * (config.hardware.gpus or config.processes)
    )
