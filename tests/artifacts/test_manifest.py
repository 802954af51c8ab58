"""Fingerprints, atomic writes and checksums."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import ParentEntry, fingerprint, flatten, sha256_file, write_atomically
from components.artifacts.manifest import collect_files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON), st.integers(0, 5))
def test_the_fingerprint_survives_json_and_key_order(config, version):
    reordered = json.loads(json.dumps(dict(reversed(config.items()))))
    assert fingerprint("s", version, config, {}) == fingerprint("s", version, reordered, {})


@given(st.dictionaries(st.text(), JSON), st.dictionaries(st.text(), JSON))
def test_different_configs_have_different_fingerprints(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint("s", 1, one, {}) == fingerprint("s", 1, other, {})) == same


def test_the_fingerprint_covers_stage_version_and_parents():
    parent = {"a": ParentEntry(stage="a", fingerprint="1")}
    values = {
        fingerprint("s", 1, {}, {}),
        fingerprint("t", 1, {}, {}),
        fingerprint("s", 2, {}, {}),
        fingerprint("s", 1, {}, parent),
        fingerprint("s", 1, {}, {"a": ParentEntry(stage="a", fingerprint="2")}),
        fingerprint("s", 1, {}, {"b": ParentEntry(stage="a", fingerprint="1")}),
    }
    assert len(values) == 6


def test_flatten_names_nested_fields():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path):
    target = tmp_path / "state.json"
    contents = [bytes([65 + n]) * 3_000_000 for n in range(2)]
    write_atomically(target, contents[0])
    seen = set()
    for attempt in range(12):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            while True:
                write_atomically(target, contents[1])
                os.write(writer, b"1")
                write_atomically(target, contents[0])
                os.write(writer, b"0")
        for _ in range(attempt):  # killed within the next write
            os.read(reader, 1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        data = target.read_bytes()
        assert data in contents
        seen.add(data[:1])
    assert seen


def test_hidden_files_and_the_manifest_are_not_part_of_an_artefact(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".work").mkdir()
    for name in ("a.bin", "sub/b.bin", ".work/c", ".state", "manifest.json"):
        (tmp_path / name).write_bytes(name.encode())
    entries = collect_files(tmp_path)
    assert set(entries) == {"a.bin", "sub/b.bin"}
    assert entries["a.bin"].sha256 == sha256_file(tmp_path / "a.bin")
