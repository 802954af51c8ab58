"""Checkpoints: every flip, cut, surplus or missing file is found, and the newest whole one is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.weights.checkpoint_store import (
    CHECKSUMS_NAME,
    CheckpointStore,
    DamagedCheckpointError,
    verify,
)

CONTENT = {"weights.pt": b"w" * 300, "nested/optimizer.pt": bytes(range(256)), "empty": b""}


def fill(draft: Path, step: int) -> None:
    for name, content in CONTENT.items():
        path = draft / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content + (str(step).encode() if content else b""))


def store_with(folder: Path, *steps: int, keep: int = 10) -> CheckpointStore:
    store = CheckpointStore(folder, keep)
    for step in steps:
        fill(store.prepare(step), step)
        store.commit(step)
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    """Two checkpoints; a test that alters them puts them back."""
    return store_with(tmp_path_factory.mktemp("checkpoints"), 5, 10)


def assert_passed_over(store: CheckpointStore) -> None:
    newest, complaints = store.newest()
    assert newest is not None and newest.step == 5, complaints
    assert len(complaints) == 1 and "step-00000010" in complaints[0]


FILES = [*CONTENT, CHECKSUMS_NAME]


@given(
    name=st.sampled_from([n for n in FILES if n != "empty"]),
    place=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
@settings(max_examples=150, deadline=None)
def test_every_flip_is_found(pristine: CheckpointStore, name: str, place: int, bit: int) -> None:
    path = pristine.folder / "step-00000010" / name
    content = path.read_bytes()
    altered = bytearray(content)
    altered[place % len(content)] ^= 1 << bit
    path.write_bytes(bytes(altered))
    try:
        assert_passed_over(pristine)
    finally:
        path.write_bytes(content)


@given(name=st.sampled_from([n for n in FILES if n != "empty"]), kept=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_every_truncation_is_found(pristine: CheckpointStore, name: str, kept: float) -> None:
    path = pristine.folder / "step-00000010" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    try:
        assert_passed_over(pristine)
    finally:
        path.write_bytes(content)


def surplus(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")

    return act


def missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        *(missing(name) for name in FILES),
        *(surplus(name) for name in ("more.pt", "nested/more", "other/more", f"nested/{CHECKSUMS_NAME}", ".hidden")),
        lambda folder: (folder / "weights.pt").rename(folder / "weights2.pt"),
        lambda folder: (folder / "empty").write_bytes(b"\0"),
        lambda folder: (folder / CHECKSUMS_NAME).write_text("[]"),
        lambda folder: (folder / CHECKSUMS_NAME).write_text("{}"),
        lambda folder: (folder / CHECKSUMS_NAME).write_bytes(b"\xff\xfe"),
        lambda folder: shutil.rmtree(folder / "nested"),
        lambda folder: (shutil.rmtree(folder), folder.mkdir()),
        # A whole checkpoint under another step's name.
        lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.parent / "step-00000005", folder)),
    ],
)  # fmt: skip
def test_other_damage_is_found(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = store_with(tmp_path, 5, 10)
    newest, complaints = store.newest()
    assert newest is not None and newest.step == 10 and complaints == []
    damage(tmp_path / "step-00000010")
    assert_passed_over(store)


def test_a_damaged_checkpoint_is_named_by_its_file(tmp_path: Path) -> None:
    store_with(tmp_path, 5)
    (tmp_path / "step-00000005" / "nested" / "optimizer.pt").write_bytes(b"short")
    with pytest.raises(
        DamagedCheckpointError, match=r"step-00000005/nested/optimizer\.pt has 5 bytes instead of 257"
    ):
        verify(tmp_path / "step-00000005")


def test_nothing_is_left_when_all_are_damaged(tmp_path: Path) -> None:
    store = store_with(tmp_path, 5, 10)
    for step in (5, 10):
        (tmp_path / f"step-{step:08d}" / "weights.pt").unlink()
    newest, complaints = store.newest()
    assert newest is None and len(complaints) == 2


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store = store_with(tmp_path, 5, 10, 15, 20, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    newest, _ = store.newest(at_most=19)
    assert newest is not None and newest.step == 15
    assert store.newest(at_most=14) == (None, [])


def test_a_kill_before_the_commit_leaves_nothing_visible(tmp_path: Path) -> None:
    store = store_with(tmp_path, 5)
    fill(store.prepare(10), 10)  # killed here
    newest, complaints = CheckpointStore(tmp_path, 2).newest()
    assert newest is not None and newest.step == 5 and complaints == []
    # The next attempt begins the draft anew: nothing of the old one gets in.
    (tmp_path / ".step-00000010" / "stale.pt").write_bytes(b"old")
    draft = store.prepare(10)
    assert names(draft) == []
    fill(draft, 10)
    store.commit(10)
    assert verify(tmp_path / "step-00000010") == (10, {}) and names(tmp_path) == [
        "step-00000005",
        "step-00000010",
    ]


def test_a_checkpoint_appears_by_one_rename(tmp_path: Path) -> None:
    """A copy would be visible while it is torn; the same folder under another name never is."""
    store = CheckpointStore(tmp_path, 2)
    draft = store.prepare(5)
    fill(draft, 5)
    number = draft.stat().st_ino
    assert store.commit(5).path.stat().st_ino == number and verify(tmp_path / "step-00000005") == (5, {})


def test_a_damaged_checkpoint_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    store = store_with(tmp_path, 5, 10)
    (tmp_path / "step-00000010" / "weights.pt").unlink()
    fill(store.prepare(10), 10)
    store.commit(10)
    newest, complaints = store.newest()
    assert newest is not None and newest.step == 10 and complaints == []


def test_what_lies_beyond_is_discarded(tmp_path: Path) -> None:
    store = store_with(tmp_path, 5, 10, 15)
    store.prepare(20)
    store.discard_after(10)
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


def test_steps_beyond_eight_digits_sort_by_number(tmp_path: Path) -> None:
    store = store_with(tmp_path, 99_999_999, 100_000_000, keep=1)
    newest, _ = store.newest()
    assert newest is not None and newest.step == 100_000_000 and names(tmp_path) == ["step-100000000"]
