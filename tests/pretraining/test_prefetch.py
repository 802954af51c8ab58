"""Reading ahead: the same batches, in time, side by side, with errors and ends in the right place."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from components.corpus.shards import Shard, ShardError, TokenShards
from components.pretraining.config import PretrainConfig
from components.pretraining.data.batches import BatchSource, MicroBatch
from components.pretraining.data.prefetch import Prefetcher
from components.pretraining.studies import data_wait
from components.pretraining.training.training_step import TrainingStep
from tests.corpus.sparse_shards import write_sparse
from tests.pretraining.factory import BATCH, STAGE_STEPS, STEPS, run_config
from tests.waiting import CEILING_S, wait_for

CPU = torch.device("cpu")


class Watched:
    """A shard that tells which rows are read, and can hold them back or fail."""

    def __init__(self, shard: Shard, before: Callable[[int], None]) -> None:
        self._shard, self._before = shard, before

    def __len__(self) -> int:
        return len(self._shard)

    def read(self, start: int, count: int) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        self._before(start)
        return self._shard.read(start, count)


def source_of(tokens: Path, before: Callable[[int], None] = lambda start: None, **values: Any) -> BatchSource:
    shards = TokenShards.open(tokens)
    streams = {name: Watched(shards.shard("train", name), before) for name in shards.categories("train")}
    return BatchSource(PretrainConfig.model_validate(run_config(**values)), streams, shards.eos_id)


def prefetcher(source: BatchSource, rank: int = 0, world: int = 1) -> Prefetcher:
    return Prefetcher(lambda step, readers: source.rank_groups(step, rank, world, readers), STEPS, CPU)


def values(groups: list[list[MicroBatch]]) -> list[list[list[Any]]]:
    return [
        [[getattr(batch, name).tolist() for name in ("input_ids_BT", "document_ids_BT", "labels_BT", "category_B")]
         for batch in group]
        for group in groups
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    wait_for(lambda: set(threading.enumerate()) <= before, "the end of threads that a test began")


@pytest.mark.parametrize(("rank", "world", "groups"), [(0, 1, 1), (1, 2, 1), (0, 1, 2), (0, 2, 2)])
def test_steps_are_the_same_as_read_one_by_one(tokens: Path, rank: int, world: int, groups: int) -> None:
    """In order, across training stages; and after a jump, as when a run resumes."""
    fields = {"sequences_per_micro_batch": 2, "load_balance_groups": groups}
    source, plain = source_of(tokens, **fields), source_of(tokens, **fields)
    batches = prefetcher(source, rank, world)
    for step in [*range(STEPS), STAGE_STEPS - 1, STAGE_STEPS, 3, STEPS - 1, 0]:
        assert values(batches.take(step)) == values(plain.rank_groups(step, rank, world)), step
    batches.close()


def test_the_next_step_is_read_before_this_one_has_ended_and_no_more(tokens: Path) -> None:
    reads: list[int] = []
    source = source_of(tokens, reads.append)
    batches = prefetcher(source)
    batches.take(0)
    wait_for(lambda: len(reads) == 2 * BATCH, "the reads of step 1 without anyone asking for it")
    wanted = sorted([*source.sequences(0).start_B.tolist(), *source.sequences(1).start_B.tolist()])
    batches.take(1)
    batches.take(2)
    wait_for(lambda: len(reads) == 4 * BATCH, "the reads of step 3")
    assert sorted(reads[: 2 * BATCH]) == wanted
    batches.close()
    assert len(reads) == 4 * BATCH, "one step ahead, not two"


def test_nothing_is_read_beyond_the_run(tokens: Path) -> None:
    reads: list[int] = []
    batches = prefetcher(source_of(tokens, reads.append))
    batches.take(STEPS - 1)
    batches.close()
    assert len(reads) == BATCH // 2  # of the last training stage


def test_rows_of_a_step_are_read_side_by_side(tokens: Path) -> None:
    """Of one micro-batch and of several: none of the reads ends before all have begun."""
    for micro in (1, 8):
        together = threading.Barrier(BATCH)

        def meet(start: int, together: threading.Barrier = together) -> None:
            together.wait(CEILING_S)

        # Two steps of eight rows meet one after the other; reading one by one would wait for ever.
        batches = prefetcher(source_of(tokens, meet, sequences_per_micro_batch=micro))
        assert sum(len(batch.category_B) for group in batches.take(0) for batch in group) == BATCH
        batches.close()


def test_training_computes_while_the_next_step_is_read(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's own step on a real engine: its backward pass waits until the next step's rows are asked for."""
    from components.pretraining.architecture import model_config
    from components.pretraining.deepspeed.engine import build_engine, enter_training_stage
    from components.pretraining.deepspeed.initial_model import initial_model
    from components.pretraining.processes.ranks import join_processes

    reads: list[int] = []
    source = source_of(tokens, reads.append)
    config = PretrainConfig.model_validate(run_config())
    ranks = join_processes(config)
    model = initial_model(config, model_config(config, TokenShards.open(tokens)), ranks)
    engine = build_engine(model, config, ranks)
    enter_training_stage(engine, config, 0, 1)
    batches = prefetcher(source)
    training = TrainingStep(engine, config, batches.take, ranks)
    backward = type(engine).backward
    asked: list[int] = []

    def waiting(self: Any, *arguments: Any, **options: Any) -> Any:
        wait_for(lambda: len(reads) >= (len(asked) // 2 + 2) * BATCH, "the reads of the next step")
        asked.append(len(reads))
        return backward(self, *arguments, **options)

    monkeypatch.setattr(type(engine), "backward", waiting)
    for step in range(3):
        training.gradients(step)
        engine.step()
    batches.close()
    assert asked == [count for step in range(3) for count in [(step + 2) * BATCH] * 2]


def test_an_error_in_the_background_is_raised_where_its_step_is_taken(tokens: Path) -> None:
    source = source_of(tokens)
    bad = int(source.sequences(2).start_B[5])

    def fail(start: int) -> None:
        if start == bad and threading.current_thread() is not threading.main_thread():
            raise ShardError("the token shard shards/train/general/00001.ds cannot be read: [Errno 5]")

    batches = prefetcher(source_of(tokens, fail))
    good = {step for step in range(2) if bad not in source.sequences(step).start_B}
    assert good == {0, 1}
    for step in sorted(good):
        batches.take(step)
    with pytest.raises(ShardError, match=r"general/00001\.ds cannot be read"):
        batches.take(2)
    batches.close()


def test_an_error_of_a_step_that_nobody_takes_is_nobodys(tokens: Path) -> None:
    """A run that stops after step 0, as at a signal, ends as if step 1 had not been tried."""
    failed = threading.Event()

    def read(step: int, readers: Executor) -> list[list[MicroBatch]]:
        if step:
            failed.set()
            raise OSError(5, "Input/output error")
        return source.rank_groups(step, 0, 1, readers)

    source = source_of(tokens)
    batches = Prefetcher(read, STEPS, CPU)
    batches.take(0)
    wait_for(failed.is_set, "the failure")
    batches.close()


def test_closing_waits_only_for_rows_that_are_being_read(tokens: Path) -> None:
    """An exception in the main thread leaves no thread, although the storage is slow just then."""
    gate, held = threading.Event(), threading.Semaphore(0)
    begun: list[int] = []

    def hold(start: int) -> None:
        begun.append(start)
        if len(begun) > BATCH:
            held.release()
            gate.wait(CEILING_S)

    batches = prefetcher(source_of(tokens, hold))
    with pytest.raises(ZeroDivisionError):
        try:
            batches.take(0)
            held.acquire(timeout=CEILING_S)
            raise ZeroDivisionError
        finally:
            gate.set()
            batches.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        batches.take(1)


def test_a_pinned_batch_shares_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU memory cannot be pinned; that every part goes through it can be seen."""
    calls: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(id(tensor))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    ids, documents, categories = torch.arange(6).view(2, 3), torch.zeros(2, 3), torch.arange(2)
    pinned = MicroBatch(ids, documents, ids, categories).pinned()
    assert calls == [id(ids), id(documents), id(categories)]
    assert pinned.labels_BT is pinned.input_ids_BT and pinned.input_ids_BT is not ids
    assert pinned.input_ids_BT.equal(ids) and pinned.category_B.equal(categories)


def test_the_measuring_command_says_how_long_was_waited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of real batches of a preset; without any computing everything is waiting, and the figures say so."""
    million = {"general": (2, 1_000_000, 1_000)}
    folder = write_sparse(tmp_path / "tokens", {"train": million, "heldout": million})
    options = [str(folder), "--steps", "3", "--compute-ms", "0", "--delay-ms", "1"]
    assert data_wait.main(options) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["read"] for line in lines] == ["ahead", "when needed"]
    for line in lines:
        assert line["wait_share"] == line["waited_s"] / line["total_s"]
    assert data_wait.main([str(tmp_path / "none")]) == 2
    assert "index.json is missing" in capsys.readouterr().err
    assert data_wait.main([*options, "--world", "9"]) == 2
