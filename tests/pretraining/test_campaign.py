"""Campaigns: dozens of ``kill -9`` leave no trace, and a thousand damaged bytes are all found.

``pytest -m campaign tests/pretraining/test_campaign.py -s`` prints where the kills fell.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from components.weights.checkpoint_store import CheckpointStore
from tests.pretraining.children import Child, Children
from tests.pretraining.conftest import Finished
from tests.pretraining.factory import BATCH, CONTEXT, MODEL, run_config, stage_config
from tests.pretraining.test_launcher import write_request
from tests.pretraining.test_training import assert_same_result, drafts, lines, logged, saved
from tests.waiting import CEILING_S, wait_for

pytestmark = pytest.mark.campaign
STEPS_EACH = 50


def campaign_config(**values: Any) -> dict[str, Any]:
    size = STEPS_EACH * BATCH * CONTEXT
    return run_config(
        model={"preset": "nano", "overrides": {**MODEL, "hidden_size": 64, "moe_num_primary_experts": 8}},
        stages=[
            stage_config(tokens=size),
            stage_config(tokens=size),
            stage_config(tokens=size, context=2 * CONTEXT, sequences_per_step=BATCH // 2, rope_theta=1.5e6),
        ],
        **values,
    )


def assert_same_tensors(one: Any, other: Any, where: str) -> int:
    """Equal to bits, whatever containers they are in; how many tensors there were."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
        return 1
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return sum(assert_same_tensors(one[key], other[key], f"{where}.{key}") for key in one)
    if isinstance(one, list | tuple):
        assert len(one) == len(other), where
        return sum(
            assert_same_tensors(a, b, f"{where}[{i}]")
            for i, (a, b) in enumerate(zip(one, other, strict=True))
        )
    if isinstance(one, bool | int | float | str | None):
        assert one == other, where
    return 0


def assert_same_checkpoint(out: Path, whole: Path) -> None:
    """The last checkpoint: weights, moments, steps, and the trainer's state, from which the data order follows."""
    folders = [folder / ".work" / "checkpoints" / f"step-{saved(folder)[-1]:08d}" for folder in (out, whole)]
    names = [sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.pt")) for folder in folders]
    assert names[0] == names[1] and len(names[0]) >= 2
    count = 0
    for name in names[0]:
        one, other = (torch.load(folder / name, weights_only=False) for folder in folders)
        if "trainer" in one:
            assert one["trainer"] == other["trainer"] and one["trainer"]["step"] == saved(whole)[-1]
        count += assert_same_tensors(one, other, name)
    assert count > 25


def is_sealing(out: Path) -> bool:
    """DeepSpeed's last file is whole (the end of a zip is written last), and the checkpoint is not visible yet."""
    parts = (out / ".work" / "checkpoints").glob(".step-*/*zero_pp_rank_0*")
    return any(zipfile.is_zipfile(part) for part in parts)


def is_writing(out: Path) -> bool:
    return bool(drafts(out)) and not is_sealing(out)


def is_exporting(out: Path) -> bool:
    return any((out / ".work").glob("export-*"))


@dataclass
class Looks:
    """True from the so-manieth look on: a moment of the run that nothing else marks."""

    left: int

    def __call__(self, out: Path) -> bool:
        self.left -= 1
        return self.left < 0


def caught(out: Path, step: int, aim: Callable[[Path], bool]) -> bool:
    return logged(out) >= step and aim(out)


def plan_of_kills(dice: random.Random) -> list[tuple[int, str, Callable[[Path], bool]]]:
    """Twenty kills as (step that must be logged, name, what to catch), in the order of the run.

    Fourteen are spread over the steps and over what is done with files between two of them.
    """
    last = 3 * STEPS_EACH - 15
    kills: list[tuple[int, str, Callable[[Path], bool]]] = [
        (dice.randrange(0, last), "uniform", Looks(dice.randrange(40))) for _ in range(14)
    ]
    kills += [(dice.randrange(0, last), "writing", is_writing) for _ in range(2)]
    kills += [(dice.randrange(0, last), "sealing", is_sealing) for _ in range(2)]
    kills += [(number * STEPS_EACH, "export", is_exporting) for number in (1, 2)]
    return sorted(kills, key=lambda kill: kill[0])


def fall(out: Path) -> str:
    """Where the run stood when it was killed."""
    stages = [path.name for path in sorted(out.glob("stage?"))]
    state = "saving" if drafts(out) else "exporting" if is_exporting(out) else "between"
    return f"logged {logged(out)}, saved {saved(out)[-1:]}, finished {len(stages)}, {state}"


def test_twenty_kills(tmp_path: Path, tokens: Path, children: Children) -> None:
    config = campaign_config()
    whole = Finished(tmp_path / "whole", children.run(tokens, tmp_path / "whole", config))
    out = tmp_path / "out"
    for number, (target, name, aim) in enumerate(plan_of_kills(random.Random(20260728)), 1):
        child: Child = children.start(tokens, out, config, freeze_when=partial(caught, out, target, aim))
        child.await_frozen()
        child.kill()
        print(f"\nkill {number:2} {name:8} {fall(out)}")
    answer = children.run(tokens, out, config)
    assert answer["metrics"] == whole.answer["metrics"]
    assert_same_result(out, whole)
    assert_same_checkpoint(out, whole.out)
    assert drafts(out) == [] and saved(out) == saved(whole.out)


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_kills_of_two_processes(
    tmp_path: Path, tokens: Path, children: Children, expert_parallel: int
) -> None:
    values: dict[str, Any] = {"processes": 2, "zero_stage": 2}
    values["expert_parallel"] = expert_parallel
    config = campaign_config(**values)
    dice = random.Random(7)

    def start(place: Path) -> list[Any]:
        request = place / ".work" / "request.json"
        if not request.exists():
            write_request(place, tokens, config)
        request.with_name("result.json").unlink(missing_ok=True)
        return children.start_ranks(2, request)

    def end(place: Path, ranks: list[Any]) -> dict[str, Any]:
        for process in ranks:
            process.join(CEILING_S)
        assert [process.exitcode for process in ranks] == [0, 0]
        answer: dict[str, Any] = json.loads((place / ".work" / "result.json").read_text())
        return answer

    wanted = end(tmp_path / "whole", start(tmp_path / "whole"))
    out, kills = tmp_path / "out", 0
    for number, target in enumerate(sorted(dice.randrange(0, 3 * STEPS_EACH - 6) for _ in range(6))):
        ranks = start(out)

        def due(first: Any = ranks[0], target: int = target, saving: bool = number % 3 == 2) -> bool:
            ended = not first.is_alive()
            return ended or (logged(out) >= target and (bool(drafts(out)) or not saving))

        wait_for(due, f"step {target}")
        if not all(process.is_alive() for process in ranks):
            continue
        dice.shuffle(ranks)
        for process in ranks:  # torchrun ends the others when one dies; the machine may take them all at once
            process.kill()
            if dice.random() < 0.5:
                process.join(CEILING_S)
        for process in ranks:
            process.join(CEILING_S)
        # The second may have met the lost connection before its own kill.
        assert ranks[0].exitcode == -signal.SIGKILL and ranks[1].exitcode in (-signal.SIGKILL, 1)
        kills += 1
        print(f"\nkill {kills} of both: {fall(out)}")
    answer = end(out, start(out))
    assert kills >= 4
    assert answer["evaluations"] == wanted["evaluations"]
    assert lines(out) == lines(tmp_path / "whole")
    for stage in ("stage1", "stage2", "stage3"):
        weights = [folder / stage / "model.safetensors" for folder in (out, tmp_path / "whole")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert_same_checkpoint(out, tmp_path / "whole")


def test_a_thousand_damaged_files_are_all_found(tmp_path: Path, whole: Finished) -> None:
    """Flips and cuts over every file of a real checkpoint; the one before it is used instead."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole.out / ".work" / "checkpoints", folder)
    store = CheckpointStore(folder, 5)
    before, newest = saved(whole.out)
    files = sorted(path for path in (folder / f"step-{newest:08d}").rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    dice = random.Random(11)
    found, hit = 0, dict.fromkeys(files, 0)
    for number in range(1000):
        # Every second one by bytes, so that large files get most; the others by file, so that small ones get some.
        path = dice.choices(files, [len(contents[p]) for p in files])[0] if number % 2 else dice.choice(files)
        content = contents[path]
        if not content:
            continue
        place = dice.randrange(len(content))
        if number % 5 == 0:
            path.write_bytes(content[:place])
        else:
            with path.open("r+b") as handle:
                handle.seek(place)
                handle.write(bytes([content[place] ^ (1 << dice.randrange(8))]))
        checkpoint, complaints = store.newest()
        path.write_bytes(content)
        assert checkpoint is not None and checkpoint.step == before and len(complaints) == 1, (path, place)
        found, hit[path] = found + 1, hit[path] + 1
    checkpoint, complaints = store.newest()
    assert checkpoint is not None and checkpoint.step == newest and complaints == []
    print(f"{found} damages found:")
    print("\n".join(f"{count:4} in {path.name} ({len(contents[path])} bytes)" for path, count in hit.items()))
    assert found >= 1000 and min(hit.values()) > 10
