"""Starting on a terabyte: what opening, checking and the first step read, counted by the kernel."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.artifacts import ArtifactError, FileEntry, Manifest
from components.artifacts.digests import sampled_sha256
from components.artifacts.verification import file_system_time_ns, remember
from components.corpus.shards import TokenShards
from components.measures.heldout import HeldOut
from components.pretraining.config import PretrainConfig
from components.pretraining.data.batches import BatchSource
from components.pretraining.presets import PRESETS
from flows import pipeline, pretrain
from flows.stages import STAGES, upstream
from tests.corpus.sparse_shards import EOS, TOKEN_BYTES, write_sparse
from tests.flows.conftest import TOY_STAGES
from tests.waiting import wait_for

FILES, FILE_TOKENS, FILE_DOCUMENTS = 256, 1 << 30, 1 << 16
FILE_BYTES = FILE_TOKENS * TOKEN_BYTES
TERABYTE = FILES * FILE_BYTES
# head -c 4294967296 /dev/zero | sha256sum
ZEROS_SHA256 = "8479e43911dc45e89f934fe48d01297e16f51d17aa561d4d1c216b1ae0fcddca"
PARENT, STAGE = TOY_STAGES[:2]


@contextmanager
def bytes_read(what: str) -> Iterator[list[int]]:
    """How many bytes this process asked the kernel for within the block."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before, began_s, found = count(), time.perf_counter(), []
    yield found
    found.append(count() - before)
    print(f"{what}: {found[0] / 2**20:,.1f} MiB read in {time.perf_counter() - began_s:.2f} s")


def describe(path: Path) -> FileEntry:
    """An entry without hashing 4 GiB of zeros 256 times."""
    size = path.stat().st_size
    if size < FILE_BYTES:
        return FileEntry.of(path)
    return FileEntry(size_bytes=size, sha256=ZEROS_SHA256, sampled_sha256=sampled_sha256(path, size))


def terabyte(runner) -> Path:
    """A finished artefact of the first toy stage that holds a terabyte of token shards; its folder."""
    identity = runner.identity(PARENT)
    folder = runner.store.folder(identity)
    size = {"general": (FILES, FILE_TOKENS, FILE_DOCUMENTS)}
    write_sparse(folder, {"train": size, "heldout": {"general": (1, 1 << 20, 1 << 10)}})
    (folder / "data.txt").write_text("first=1;")  # what the second toy stage reads
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = Manifest(
        stage="first", stage_version=1, recipe="toy", fingerprint=identity.fingerprint,
        config=dict(identity.config), parents={}, files={name: describe(folder / name) for name in names},
        metrics={}, code_revision="r", created_at="now", duration_s=1.0, peak_memory_bytes=1,
    )  # fmt: skip
    runner.store.write_manifest(folder, manifest)
    newest = max((folder / name).stat().st_ctime_ns for name in names)
    began_ns = wait_for(
        lambda: (now := file_system_time_ns(folder)) and now > newest and now, "the file system's next tick"
    )
    remember(folder, manifest.files, began_ns)
    return folder


def test_a_terabyte_is_opened_checked_and_started_on_by_reading_a_thousandth(toy) -> None:
    runner = toy()
    folder = terabyte(runner)
    with bytes_read("check and stage") as checked:
        outcome = runner.run_stage(STAGE)
    assert outcome.manifest.metrics["value"] == 1 and not any("samples" in line for line in runner.said)
    assert checked[0] < TERABYTE / 1000
    with bytes_read("open") as opened:
        shards = TokenShards.open(folder)
        held = HeldOut.open(shards, folder / "tokenizer" / "tokenizer.json", 100_000)
    assert (
        len(shards.shard("train", "general")) == FILES * FILE_TOKENS
        and len(held.streams["general"]) == 100_000
    )
    assert opened[0] < 10 * 2**20
    part = PRESETS["21b"]().model_dump()
    config = PretrainConfig.model_validate({**part, "absent_category": "renormalise"})
    with bytes_read("first step of one of 256 ranks") as read:
        source = BatchSource(config, {"general": shards.shard("train", "general")}, EOS)
        groups = source.rank_groups(0, 255, 256)
    rows = sum(len(batch.input_ids_BT) for group in groups for batch in group)
    assert rows == config.stages[0].sequences_per_step // 256
    assert read[0] <= rows * config.stages[0].context * TOKEN_BYTES + 2**20


def test_damage_in_a_terabyte_stops_the_start(toy) -> None:
    """One bit of a small file, other contents of a large one that looks untouched, a shorter one."""
    folder = terabyte(toy())
    path = folder / "shards/train/general/00101.ds"
    index = path.with_name(f"{path.name}.index")
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 4
    index.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"00101\.ds\.index does not match its SHA-256.*--rebuild first"):
        toy().run_stage(STAGE)
    content[len(content) // 2] ^= 4
    index.write_bytes(content)
    with path.open("r+b") as file:
        file.seek(FILE_BYTES // 3)
        file.write(b"\1" * (128 << 20))
    record = folder.parent / f".{folder.name}.verified.json"
    remembered, state = json.loads(record.read_text()), path.stat()
    stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    remembered["files"][path.relative_to(folder).as_posix()][:4] = stamp
    record.write_text(json.dumps(remembered))
    with pytest.raises(ArtifactError, match=r"00101\.ds does not match its sampled SHA-256.*--rebuild first"):
        toy().run_stage(STAGE)
    with path.open("r+b") as file:
        file.truncate(FILE_BYTES - 1)
    with (
        bytes_read("a plan that finds a cut file") as read,
        pytest.raises(ArtifactError, match=r"00101\.ds has 4294"),
    ):
        toy().plan(TOY_STAGES)
    assert read[0] < 10 * 2**20


@pytest.mark.campaign
def test_a_terabyte_that_nobody_has_read_is_started_on_too(toy) -> None:
    """Copied from elsewhere: 32 GiB are read whole, the rest in samples, and a sentence says so."""
    digest = hashlib.sha256()
    for _ in range(FILE_BYTES >> 20):
        digest.update(bytes(1 << 20))
    assert digest.hexdigest() == ZEROS_SHA256
    folder = terabyte(toy())
    (folder.parent / f".{folder.name}.verified.json").unlink()
    runner = toy()
    with bytes_read("check and stage") as checked:
        runner.run_stage(STAGE)
    assert 32 * 2**30 < checked[0] < 34 * 2**30
    (sentence,) = [line for line in runner.said if "samples" in line]
    assert f"first: {FILES - 8} of " in sentence


# ---------------------------------------------------------------- reading everything


def test_every_byte_of_what_is_finished_can_be_read(toy, monkeypatch) -> None:
    monkeypatch.setattr("components.artifacts.verification.EVERY_START_BYTES", 0)
    runner = toy()
    runner.run_stage(PARENT)
    runner.run_stage(STAGE)
    runner.verify(TOY_STAGES)
    assert [line.split()[:2] for line in runner.said[-4:]] == [
        ["first", "2"], ["second", "2"], ["aside", "not"], ["third", "not"],
    ]  # fmt: skip
    for stage in (PARENT, STAGE):
        path = runner.store.folder(runner.identity(stage)) / "metrics.jsonl"
        path.write_bytes(path.read_bytes().replace(b"3.0", b"3.1"))
    with pytest.raises(ArtifactError) as error:
        toy().verify(TOY_STAGES)
    for name in ("first", "second"):
        assert f"stage {name} in" in str(error.value) and f"--rebuild {name}" in str(error.value)


@pytest.mark.parametrize("command", [pipeline.main, pretrain.main])
def test_the_commands_read_and_stop(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--recipe", "smoke", "--verify", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().err.splitlines()
    wanted = upstream("pretrain") if command is pretrain.main else STAGES
    assert [line.split() for line in said] == [[stage.name, "not", "finished"] for stage in wanted]
    assert list(tmp_path.iterdir()) == []


def test_what_a_build_has_hashed_is_not_read_whole_at_the_next_start(toy, monkeypatch) -> None:
    monkeypatch.setattr("components.artifacts.verification.EVERY_START_BYTES", 0)
    runner = toy()
    folder = runner.store.folder(runner.identity(PARENT))
    folder.mkdir(parents=True)
    (folder / "large.bin").write_bytes(bytes(3 << 20))  # of an earlier attempt
    written_ns = (folder / "large.bin").stat().st_ctime_ns
    wait_for(lambda: (file_system_time_ns(folder) or 0) > written_ns, "the file system's next tick")
    runner.run_stage(PARENT)
    check = toy().store.verify(runner.identity(PARENT))
    assert check is not None and check.sampled == ("large.bin",) and check.unread == ()
