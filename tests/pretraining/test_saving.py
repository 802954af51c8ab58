"""Sealing: in the background, with every process's share, and never a checkpoint that is visible too early."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import StageError
from components.pretraining.checkpoints import saving
from components.pretraining.checkpoints.saving import Saver
from components.pretraining.config import PretrainConfig
from components.pretraining.processes.ranks import Ranks
from components.weights.checkpoint_store import (
    CHECKSUMS_NAME,
    CheckpointStore,
    DamagedCheckpointError,
    split_by_size,
    verify,
)
from tests.pretraining.children import Children
from tests.pretraining.factory import run_config
from tests.pretraining.test_dropping import backward, build
from tests.pretraining.test_training import flip
from tests.waiting import CEILING_S, wait_for


@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 1000)), st.integers(1, 6))
def test_files_are_dealt_once_and_evenly(sizes: dict[str, int], shares: int) -> None:
    hands = split_by_size(sizes, shares)
    assert len(hands) == shares and sorted(name for hand in hands for name in hand) == sorted(sizes)
    loads = [sum(sizes[name] for name in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


class Engine:
    """Writes files as DeepSpeed does: some through the checkpoint engine, one past it."""

    class Writer:
        def save(self, state_dict: Any, path: str) -> None:
            torch.save(state_dict, path)

    def __init__(self) -> None:
        self.checkpoint_engine = self.Writer()
        self.module = SimpleNamespace()

    def save_checkpoint(self, folder: str, tag: str, client_state: Any, save_latest: bool) -> None:
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save({"name": name, **client_state}, str(Path(folder, tag, name)))
        Path(folder, tag, "recovery.py").write_text("pass")


def saver(folder: Path, in_background: bool = True) -> tuple[Saver, CheckpointStore]:
    store = CheckpointStore(folder, 2)
    return Saver(store, Ranks(0, 1, torch.device("cpu")), {"processes": 1}, in_background), store


def waits_for_a_thread(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not threading.Thread.join.__code__:
        frame = frame.f_back
    return frame is not None


def test_training_goes_on_while_a_checkpoint_is_sealed_and_the_next_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    checksum = saving.checksum

    def held(*arguments: Any) -> Any:
        reached.set()
        assert go_on.wait(CEILING_S)
        return checksum(*arguments)

    monkeypatch.setattr(saving, "checksum", held)
    own, store = saver(tmp_path)
    own.save(Engine(), 5, {"step": 5})  # returns while the sealing is held
    assert reached.wait(CEILING_S) and store.steps() == []
    second = threading.Thread(target=own.save, args=(Engine(), 10, {"step": 10}))
    second.start()
    # It may wait for the first one's thread, and do nothing else.
    draft = tmp_path / ".step-00000010"
    wait_for(lambda: waits_for_a_thread(second) or draft.exists(), "what the second save does first")
    assert second.is_alive() and not draft.exists()
    go_on.set()
    second.join(CEILING_S)
    own.wait()
    assert store.steps() == [5, 10]
    assert verify(tmp_path / "step-00000005") == (5, {"processes": 1})
    files = json.loads((tmp_path / "step-00000010" / CHECKSUMS_NAME).read_text())["files"]
    assert set(files) == {"model.pt", "optimizer.pt", "recovery.py"}


@pytest.mark.parametrize("in_background", [True, False])
def test_a_failure_surfaces_at_the_next_wait_and_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    own, store = saver(tmp_path, in_background)
    own.save(Engine(), 5, {})
    own.wait()

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "checksum", full)
    if in_background:
        own.save(Engine(), 10, {})
        with pytest.raises(OSError, match="No space left"):
            own.wait()
        own.save(Engine(), 10, {})
        with pytest.raises(OSError, match="No space left"):
            own.save(Engine(), 15, {})
    else:
        with pytest.raises(OSError, match="No space left"):
            own.save(Engine(), 10, {})
    own.settle()
    monkeypatch.undo()
    assert store.steps() == [5] and store.newest()[0] is not None
    own.save(Engine(), 10, {})
    own.wait()
    assert store.steps() == [5, 10]


def test_a_file_that_vanishes_while_sealing_is_no_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    checksum = saving.checksum

    def losing(folder: Path, names: list[str]) -> Any:
        entries = checksum(folder, names)
        (folder / "model.pt").unlink()
        return entries

    monkeypatch.setattr(saving, "checksum", losing)
    own, store = saver(tmp_path)
    own.save(Engine(), 5, {})
    with pytest.raises(DamagedCheckpointError, match=r"lost files while it was written: model\.pt"):
        own.wait()
    assert store.steps() == []


def share_work(values: dict[str, Any], place: Path) -> None:
    """Two ranks save; each writes down what it checksummed, then one fails, then a damaged file is looked for."""
    from components.pretraining.processes.collectives import Collectives

    config = PretrainConfig.model_validate(values)
    engine, ranks = build(config)
    backward(engine, config, ranks, 0)
    engine.step()
    store = CheckpointStore(place / "checkpoints", 5)
    collectives = Collectives(ranks)
    own = Saver(store, ranks, {"processes": 2}, in_background=True)
    original, seen = saving.checksum, []

    def watched(folder: Path, names: list[str]) -> Any:
        seen.extend(names)
        return original(folder, names)

    saving.checksum = watched
    for step in (1, 2):
        own.save(engine, step, {})
        own.wait()
    (place / f"rank-{ranks.rank}.json").write_text(json.dumps(seen[: len(seen) // 2]))

    def failing(folder: Path, names: list[str]) -> Any:
        if ranks.rank == 1:
            raise OSError(28, "No space left on device")
        return original(folder, names)

    saving.checksum = failing
    own.save(engine, 3, {})
    try:
        own.wait()
    except OSError:
        assert ranks.rank == 1
    except StageError as error:
        assert ranks.rank == 0 and "The checkpoint of step 3 could not be sealed: " in str(error)
    else:
        raise AssertionError("nobody noticed")
    collectives.barrier()
    assert store.steps() == [1, 2]
    if ranks.is_first:
        flip(max((store.path(2)).glob("*zero_pp_rank_0*")))
    collectives.barrier()
    found, complaints = saving.find_newest(store, None, ranks, collectives)
    assert found is not None and found.step == 1 and found.mesh == {"processes": 2}
    assert len(complaints) == 1 and "zero_pp_rank_0" in complaints[0]
    collectives.barrier()
    os._exit(0)


def test_every_process_seals_what_it_wrote_and_all_learn_of_a_failure(
    tmp_path: Path, children: Children
) -> None:
    children.call_ranks(2, share_work, run_config(sequences_per_micro_batch=2), tmp_path)
    shares = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [name for name in shares[1] if "rank_1" in name] == shares[1] != []
    assert any("model_states" in name for name in shares[0]) and any("zero_pp_rank_0" in n for n in shares[0])
    files = json.loads((tmp_path / "checkpoints" / "step-00000002" / CHECKSUMS_NAME).read_text())["files"]
    # DeepSpeed copies its recovery script past its own writer; the first process takes what nobody claimed.
    assert set(files) == {*shares[0], *shares[1], "zero_to_fp32.py"} or set(files) == {*shares[0], *shares[1]}
