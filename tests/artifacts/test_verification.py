"""What a start reads of an artefact, what it finds, and what only reading everything finds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.artifacts import Manifest
from components.artifacts.digests import SAMPLED_FROM_BYTES, sample_starts, sampled_sha256
from components.artifacts.manifest import FileEntry, collect_files
from components.artifacts.verification import (
    check_sizes,
    check_start,
    check_whole,
    file_system_time_ns,
    remember,
)

MIB = 1 << 20
BLOCK = 1 << 14
SIZES = {"empty": 0, "byte": 1, "block": BLOCK, "below": MIB - 1, "sub/at": MIB, "sub/above": 3 * MIB + 5}


def manifest_of(folder: Path) -> Manifest:
    return Manifest(
        stage="first", stage_version=1, recipe="toy", fingerprint="f", config={}, parents={},
        files=collect_files(folder), metrics={}, code_revision="r", created_at="now", duration_s=1.0,
        peak_memory_bytes=1,
    )  # fmt: skip


def write(folder: Path, sizes: dict[str, int]) -> Manifest:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    return manifest_of(folder)


def flip(path: Path, place: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def rot(folder: Path, manifest: Manifest, name: str, place: int) -> None:
    """Change a bit as a disk does: size, times and inode are the remembered ones."""
    flip(folder / name, place)
    record = folder.parent / f".{folder.name}.verified.json"
    state = (folder / name).stat()
    contents = json.loads(record.read_text())
    stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    contents["files"][name] = [*stamp, manifest.files[name].sha256]
    record.write_text(json.dumps(contents))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("store") / "0123456789ab"
    return folder, write(folder, SIZES)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    name=st.sampled_from([n for n, size in SIZES.items() if size]),
    place=st.floats(0, 1),
    bit=st.integers(0, 7),
)
def test_every_flip_in_an_artefact_of_less_than_4_gib_is_found_at_every_start(
    artefact: tuple[Path, Manifest], name: str, place: float, bit: int
) -> None:
    folder, manifest = artefact
    position = min(int(place * SIZES[name]), SIZES[name] - 1)
    check_whole(folder, manifest, lambda count: None)
    rot_free = (folder / name).read_bytes()
    flip(folder / name, position, bit)
    try:
        check = check_start(folder, manifest)
        assert check.problems == (f"{name} does not match its SHA-256",) and check.sampled == ()
    finally:
        (folder / name).write_bytes(rot_free)
    assert check_start(folder, manifest).problems == ()


def test_missing_and_cut_files_are_found_before_anything_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    manifest = write(folder, {"large": 2 * MIB, "gone": 5})
    (folder / "gone").unlink()
    (folder / "large").write_bytes(b"x")
    wanted = ["gone is missing", f"large has 1 bytes, the manifest says {2 * MIB}"]
    read: list[int] = []
    assert check_sizes(folder, manifest) == wanted == list(check_start(folder, manifest).problems)
    assert check_whole(folder, manifest, read.append) == wanted and read == []


# ---------------------------------------------------------------- large artefacts


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Manifest]:
    """An artefact beyond both limits, which are lowered instead of the files being raised."""
    monkeypatch.setattr("components.artifacts.verification.EVERY_START_BYTES", 3 * MIB)
    monkeypatch.setattr("components.artifacts.verification.FIRST_START_BYTES", 9 * MIB)
    folder = tmp_path / "store" / "0123456789ab"
    sizes = {"tiny": 9, "a": MIB, "b": 2 * MIB - 9, "c": 2 * MIB, "d": 4 * MIB, "e": 4 * MIB}
    return folder, write(folder, sizes)


def remember_all(folder: Path, manifest: Manifest) -> None:
    """As at a build: read after the last change, by the file system's clock."""
    while (began_ns := file_system_time_ns(folder)) == max(p.stat().st_ctime_ns for p in folder.iterdir()):
        pass
    assert check_whole(folder, manifest, lambda count: None) == []
    remember(folder, manifest.files, began_ns)


def test_what_nobody_has_read_is_read_whole_up_to_a_limit(large: tuple[Path, Manifest]) -> None:
    folder, manifest = large
    check = check_start(folder, manifest)
    assert check.whole == ("tiny", "a", "b", "c", "d") and check.sampled == check.unread == ("e",)
    assert check.problems == ()


def test_what_was_read_and_is_unchanged_is_not_read_again(large: tuple[Path, Manifest]) -> None:
    folder, manifest = large
    remember_all(folder, manifest)
    check = check_start(folder, manifest)
    assert check.whole == ("tiny", "a", "b") and check.sampled == ("c", "d", "e") and check.unread == ()


@pytest.mark.parametrize(
    "change", ["write", "write and reset the times", "replace", "copy the artefact", "other digest"]
)
def test_whatever_changes_a_file_makes_it_unread(large: tuple[Path, Manifest], change: str) -> None:
    folder, manifest = large
    remember_all(folder, manifest)
    path = folder / "d"
    before, content = path.stat(), path.read_bytes()
    if change == "write":
        path.write_bytes(content)
    elif change == "write and reset the times":
        flip(path, 2 * MIB)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "replace":
        other = folder.parent / "other"
        other.write_bytes(content)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)
    elif change == "copy the artefact":
        record = folder.parent / f".{folder.name}.verified.json"
        shutil.copytree(folder, folder.with_name("copy"))
        folder = folder.rename(folder.with_name("aside"))
        folder = folder.with_name("copy").rename(folder.with_name("0123456789ab"))
        assert record.exists()
    else:
        wrong = manifest.files["d"].model_copy(update={"sha256": "0" * 64})
        manifest = manifest.model_copy(update={"files": {**manifest.files, "d": wrong}})
    check = check_start(folder, manifest)
    assert "d" in check.whole
    found = (
        ("d does not match its SHA-256",) if change in ("write and reset the times", "other digest") else ()
    )
    assert check.problems == found


def test_a_file_that_is_written_while_it_is_read_is_not_remembered(large: tuple[Path, Manifest]) -> None:
    folder, manifest = large
    remember_all(folder, manifest)
    began_ns = file_system_time_ns(folder)
    (folder / "d").write_bytes(
        (folder / "d").read_bytes()
    )  # after the reading began: the same tick is enough
    remember(folder, manifest.files, began_ns)
    assert "d" in check_start(folder, manifest).whole


def test_a_torn_or_missing_record_only_costs_reading(large: tuple[Path, Manifest]) -> None:
    folder, manifest = large
    remember_all(folder, manifest)
    record = folder.parent / f".{folder.name}.verified.json"
    good = record.read_text()
    for text in ("", good[: len(good) // 2], "[]", '{"files": 3}', '{"files": {"d": 7, "e": [1]}}'):
        record.write_text(text)
        check = check_start(folder, manifest)
        assert check.problems == () and "d" in check.whole and check.unread == ("e",)


def test_where_nothing_can_be_written_nothing_is_remembered(
    large: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a volume that is mounted read-only."""
    folder, manifest = large

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for _ in range(2):
        check = check_start(folder, manifest)
        assert check.problems == () and check.unread == ("e",)
    assert not (folder.parent / f".{folder.name}.verified.json").exists()


def test_rot_in_a_large_file_is_found_by_samples_where_they_lie_and_by_reading_everything(
    large: tuple[Path, Manifest],
) -> None:
    folder, manifest = large
    remember_all(folder, manifest)
    size = manifest.files["e"].size_bytes
    starts = list(sample_starts(size))
    covered = sorted(place for start in starts for place in (start, start + BLOCK - 1))
    between = next(place for place in range(BLOCK, size) if not any(s <= place < s + BLOCK for s in starts))
    for place in covered:
        rot(folder, manifest, "e", place)
        assert check_start(folder, manifest).problems == ("e does not match its sampled SHA-256",)
        rot(folder, manifest, "e", place)
    rot(folder, manifest, "e", between)
    check = check_start(folder, manifest)
    assert check.problems == () and "e" in check.sampled, "sampling cannot find a bit between its blocks"
    assert check_whole(folder, manifest, lambda count: None) == ["e does not match its SHA-256"]


def test_manifests_of_before_samples_are_read_whole_until_they_are_remembered(
    large: tuple[Path, Manifest],
) -> None:
    folder, manifest = large
    files = {name: FileEntry(size_bytes=e.size_bytes, sha256=e.sha256) for name, e in manifest.files.items()}
    older = Manifest.model_validate_json(
        manifest.model_copy(update={"files": files}).model_dump_json().replace(',"sampled_sha256":null', "")
    )
    assert set(check_start(folder, older).whole) == set(files)
    remember_all(folder, older)
    assert check_start(folder, older).whole == ("tiny", "a", "b")
    flip(folder / "e", 7)
    assert check_start(folder, older).problems == ("e does not match its SHA-256",)


# ---------------------------------------------------------------- samples


@given(st.integers(SAMPLED_FROM_BYTES, 1 << 36), st.data())
def test_samples_are_few_and_miss_no_stretch_of_128_mib(size: int, data: st.DataObject) -> None:
    starts = list(sample_starts(size))
    assert starts == sorted(starts) and starts[0] == 0 and starts[-1] == size - BLOCK
    assert all(0 <= start <= size - BLOCK for start in starts)
    assert len(starts) * BLOCK <= size / 4096 + 3 * BLOCK
    stretch = 128 * MIB
    if size >= stretch:
        begin = data.draw(st.integers(0, size - stretch))
        assert any(begin <= start and start + BLOCK <= begin + stretch for start in starts)
    assert list(sample_starts(size)) == starts, "the same on every machine and in every process"


def test_a_sample_is_of_the_size_too(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(bytes(2 * MIB))
    one = sampled_sha256(path, 2 * MIB)
    path.write_bytes(bytes(2 * MIB + 1))
    assert sampled_sha256(path, 2 * MIB + 1) != one


def test_samples_stay_what_manifests_hold(tmp_path: Path) -> None:
    """Other blocks or another digest would make every finished artefact look damaged."""
    path = tmp_path / "zeros"
    path.write_bytes(bytes(2 * MIB))
    assert sampled_sha256(path, 2 * MIB) == "524df07c904d4b9e51751c906c6caa9cb563f19da678a439ba7d0bedf70293dc"
    assert list(sample_starts(1 << 30))[:4] == [0, 53324999, 100260982, 147381758]


def test_an_error_in_a_thread_ends_the_reading_with_its_own_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    manifest = write(folder, {f"{number:03}": 2 * MIB for number in range(20)})
    read: list[int] = []

    def advance(count: int) -> None:
        read.append(count)
        if len(read) == 3:
            raise OSError(5, "Input/output error", "017")

    with pytest.raises(OSError, match="Input/output error"):
        check_whole(folder, manifest, advance)
    # What had not begun was dropped, and what had begun stopped at its next piece.
    assert len(read) < 20
