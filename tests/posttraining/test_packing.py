"""Packing: every token once, no leak between dialogues, order a pure function of seed and step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import StageError
from components.corpus.dialogues import Encoded
from components.posttraining.packing import IGNORED_LABEL, PackedRows, pack
from tests.posttraining.factory import small_model


def dialogue(start: int, length: int, prompt: int = 2) -> Encoded:
    ids = tuple(range(start, start + length))
    return Encoded(ids, tuple(position >= prompt for position in range(length)))


def made(count: int, seed: int = 0, longest: int = 30) -> list[Encoded]:
    lengths = np.random.default_rng(seed).integers(3, longest + 1, size=count).tolist()
    return [dialogue(1 + index * 7 % 400, length) for index, length in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=200), st.integers(0, 3))
def test_rows_hold_every_dialogue_once_and_never_overflow(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 40, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 40 for row in rows)
    # Best fit never opens a row while two half-empty ones could be joined, within a bucket.
    loads = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > 40
    assert rows == pack(lengths, 40, seed)


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    dialogues = made(50)
    rows, again = PackedRows(dialogues, 64, 3), PackedRows(dialogues, 64, 3)
    other = PackedRows(dialogues, 64, 4)
    wanted = [rows.batch(step, 4).input_ids_BT for step in range(12)]
    for step in reversed(range(12)):
        assert torch.equal(again.batch(step, 4).input_ids_BT, wanted[step])
    assert any(not torch.equal(other.batch(step, 4).input_ids_BT, wanted[step]) for step in range(3))


def test_an_epoch_visits_every_row_once_across_its_border() -> None:
    rows = PackedRows(made(40), 64, 0)
    per_step = 4
    assert len(rows) % per_step  # so that a step spans two epochs
    seen: list[tuple[int, ...]] = []
    for step in range(3 * len(rows)):
        seen += [tuple(row.tolist()) for row in rows.batch(step, per_step).input_ids_BT]
    epochs = [seen[start : start + len(rows)] for start in range(0, 12 * len(rows), len(rows))]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_layout_of_a_row() -> None:
    rows = PackedRows([dialogue(10, 5), dialogue(20, 4, prompt=0)], 12, 0)
    batch = rows.build([0])
    assert batch.input_ids_BT.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 23, 0, 0, 0]]
    assert batch.document_ids_BT.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]]
    n = IGNORED_LABEL
    assert batch.labels_BT.tolist() == [[n, n, 12, 13, 14, n, 21, 22, 23, n, n, n]]
    assert batch.trained_tokens == 6 and batch.trimmed().input_ids_BT.shape == (1, 9)
    assert rows.owners(0, [7, 9]) == [7] * 5 + [9] * 4 + [0] * 3


def test_long_dialogues_are_cut_and_empty_ones_dropped() -> None:
    rows = PackedRows([dialogue(1, 20), dialogue(30, 20, prompt=12)], 8, 0)
    assert (rows.cut, rows.dropped, len(rows)) == (2, 1, 1)
    assert rows.build([0]).labels_BT.tolist() == [[IGNORED_LABEL] * 2 + list(range(3, 9))]
    with pytest.raises(StageError, match=r"raise posttrain\.context"):
        PackedRows([dialogue(1, 20, prompt=15)], 8, 0)


def test_packed_dialogues_do_not_see_each_other() -> None:
    """Logits of a packed row equal those of every dialogue alone, and the loss is the mean over both."""
    model = small_model().train(False)
    parts = [dialogue(5, 30), dialogue(100, 21), dialogue(200, 9)]
    rows = PackedRows(parts, 64, 0)
    batch = rows.build([0])
    assert len(rows) == 1
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids_BT,
            position_ids=batch.position_ids_BT,
            document_ids=batch.document_ids_BT,
            labels=batch.labels_BT,
        )
        nats = 0.0
        for part in parts:
            start = batch.input_ids_BT[0].tolist().index(part.ids[0])
            ids = torch.tensor([part.ids])
            labels = torch.where(torch.tensor([part.trained]), ids, IGNORED_LABEL)
            alone = model(input_ids=ids, labels=labels)
            torch.testing.assert_close(
                packed.logits[:, start : start + len(part.ids)], alone.logits, atol=2e-5, rtol=1e-5
            )
            nats += float(alone.ce_loss) * int((labels >= 0).sum())
    assert float(packed.ce_loss) == pytest.approx(nats / batch.trained_tokens, rel=1e-5)
