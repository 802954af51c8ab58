"""The trainer: resumed = undisturbed, split = whole, bad losses stop with the step's number."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import ValidationError

from components.artifacts import StageError
from components.posttraining.config import PosttrainConfig
from components.posttraining.packing import PackedRows
from components.posttraining.training import Schedule, Trainer, total_steps
from tests.posttraining.factory import small_model
from tests.posttraining.test_packing import made


def settings(**values: Any) -> PosttrainConfig:
    defaults: dict[str, Any] = {
        "context": 64, "rows_per_step": 4, "rows_per_micro_batch": 4, "epochs": 8.0, "max_steps": 12,
        "peak_lr": 3e-3, "threads": 1, "log_every_steps": 1, "checkpoint_every_steps": 5,
    }  # fmt: skip
    return PosttrainConfig.model_validate({**defaults, **values})


def trainer(folder: Path, **values: Any) -> Trainer:
    config = settings(**values)
    return Trainer(small_model(), PackedRows(made(40), config.context, config.seed), config, folder)


class Crash(Exception):
    """Stands for a kill between two steps."""


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    lines: dict[int, Mapping[str, float]] = {}
    whole.train(lambda values, step: lines.update({step: values}))
    assert sorted(lines) == list(range(1, 13)) and whole.progress.losses[-1] < whole.progress.losses[0]
    for crash_at in (1, 5, 8, 11):

        def log(values: Mapping[str, float], step: int, crash_at: int = crash_at) -> None:
            if step == crash_at:
                raise Crash

        folder = tmp_path / f"crash-{crash_at}"
        with pytest.raises(Crash):
            trainer(folder).train(log)
        resumed = trainer(folder)
        assert resumed.resume() == [] and resumed.progress.step == (crash_at - 1) // 5 * 5
        again: dict[int, float] = {}
        resumed.train(lambda values, step, again=again: again.update({step: values["train/loss"]}))
        assert resumed.progress.losses == whole.progress.losses
        for name, tensor in weights(whole).items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train(lambda *_: None)
    again = trainer(tmp_path)
    again.resume()
    again.train(lambda *_: pytest.fail("nothing is left to do"))
    assert all(torch.equal(weights(run)[n], t) for n, t in again.model.state_dict().items())


def test_damaged_and_foreign_checkpoints_are_passed_over(tmp_path: Path) -> None:
    trainer(tmp_path).train(lambda *_: None)
    newest = max((tmp_path).glob("step-*")) / "state.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    run = trainer(tmp_path)
    complaints = run.resume()
    assert len(complaints) == 1 and "damaged" in complaints[0] and run.progress.step == 10
    other = trainer(tmp_path, peak_lr=1e-3)
    assert "another config" in other.resume()[-1] and other.progress.step == 0


def test_micro_batches_do_not_change_the_loss_or_the_weights(tmp_path: Path) -> None:
    """The mean is over the step's assistant tokens, not over micro-batches' means."""
    whole = trainer(tmp_path / "a", max_steps=3, load_balance_coef=0.0, router_z_coef=0.0)
    split = trainer(
        tmp_path / "b", max_steps=3, rows_per_micro_batch=1, load_balance_coef=0.0, router_z_coef=0.0
    )
    counts = [whole.rows.build([row]).trained_tokens for row in range(len(whole.rows))]
    assert len(set(counts)) > 1  # else the test could not tell the two means apart
    for run in (whole, split):
        run.train(lambda *_: None)
    assert split.progress.losses == pytest.approx(whole.progress.losses, rel=1e-5)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(split.model.state_dict()[name], tensor, atol=2e-5, rtol=1e-4)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    run = trainer(
        Path(folder) / "two", max_steps=3, rows_per_micro_batch=2, load_balance_coef=0.0, router_z_coef=0.0
    )
    run.train(lambda *_: None)
    torch.save({"losses": run.progress.losses, "weights": run.model.state_dict()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    mp.start_processes(_worker, (str(tmp_path),), nprocs=2, start_method="fork")  # fork: no second import
    one = trainer(tmp_path / "one", max_steps=3, load_balance_coef=0.0, router_z_coef=0.0)
    one.train(lambda *_: None)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["losses"] == second["losses"] == pytest.approx(one.progress.losses, rel=1e-5)
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], tensor, atol=2e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path)

    def poison(values: Mapping[str, float], step: int) -> None:
        if step == 2:
            with torch.no_grad():
                run.model.model.norm.weight[0] = math.nan

    with pytest.raises(StageError, match="SFT step 3: the loss is nan"):
        run.train(poison)


def test_divergence_names_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, peak_lr=1.0, clip_norm=1000.0, max_steps=60, epochs=20.0)
    with pytest.raises(StageError, match=r"SFT step \d+: (the run diverges|the loss is|the gradient)"):
        run.train(lambda *_: None)


def test_schedule() -> None:
    schedule = Schedule.of(settings(warmup_ratio=0.25, final_lr_ratio=0.1, peak_lr=1.0, max_steps=12), 12)
    rates = [schedule.lr(step) for step in range(12)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[3] == pytest.approx(1.0)
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] == pytest.approx(0.1)
    linear = Schedule.of(settings(warmup_ratio=0.0, final_lr_ratio=0.0, peak_lr=1.0, schedule="linear"), 11)
    assert [linear.lr(step) for step in range(11)] == pytest.approx([1 - step / 10 for step in range(11)])
    assert Schedule.of(settings(), 1).lr(0) > 0


def test_total_steps() -> None:
    assert total_steps(settings(epochs=2.0, max_steps=1000), 10) == 5
    assert total_steps(settings(epochs=0.1, max_steps=1000), 3) == 1
    assert total_steps(settings(epochs=99.0, max_steps=7), 1000) == 7


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rows_per_step": 6}, "rows_per_step is 6; it must be a multiple of rows_per_micro_batch"),
        ({"kept_fractions": [1.0]}, "kept_fractions holds 1.0"),
        ({"peak_lr": 0.0}, "greater than 0"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        settings(**values)
