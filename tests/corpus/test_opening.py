"""Opening token shards and held-out text costs memory by files, never by tokens or documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from components.artifacts import PROJECT
from tests.corpus.sparse_shards import write_sparse

HUNDRED_MILLION = 100_000_000
LIMIT_BYTES = 50 * 2**20

# A process of its own, so that nobody else's memory is counted. Imports are not what is measured.
MEASURE = """
import json, re, sys, tracemalloc
from pathlib import Path
from components.corpus.shards import TokenShards
from components.evaluation.activations import HeldOutText
from components.evaluation.config import EvaluateConfig
from components.export.head_states import shard_streams
from components.measures.heldout import HeldOut
from components.measures.positions import document_beginnings

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def train(folder):
    shards = TokenShards.open(folder)
    held = HeldOut.open(shards, folder / "tokenizer" / "tokenizer.json", 1_000_000)
    return [len(shards.shard("train", "general")), len(held.streams["maths"]), held.text_bytes["maths"], held][:3]

def evaluate(folder):
    text = HeldOutText.open(folder, EvaluateConfig(heldout_tokens_per_category=10_000))
    return [len(stream) for stream in text.streams.values()]

def export(folder):
    return [len(stream) for stream in shard_streams(folder, 60_000)]

def positions(folder):
    shard = TokenShards.open(folder).shard("heldout", "maths")
    return [len(document_beginnings(shard, 256, length, 48)) for length in (24, 25)]

for folder in map(Path, sys.argv[1:]):
    for use in (train, evaluate, export, positions):
        TokenShards.open(folder)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        tracemalloc.start()
        answer = use(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(json.dumps([folder.name, use.__name__, answer, resident("VmHWM") - before, peak]))
"""


def test_a_hundred_million_tokens_and_documents_are_opened_within_50_mib(tmp_path: Path) -> None:
    """Once with the bytes of held-out tokens in the index, and once with an index from before it held them."""
    lone, longer = (1, HUNDRED_MILLION, HUNDRED_MILLION), (1, HUNDRED_MILLION, HUNDRED_MILLION // 25)
    for name in ("tokens", "older"):
        sizes = {"train": {"general": lone}, "heldout": {"general": lone, "maths": longer}}
        folder = write_sparse(tmp_path / name, sizes, token_bytes=name == "tokens")
        ends = np.arange(25, HUNDRED_MILLION + 1, 25, dtype="<u8")
        ends.tofile(folder / "shards/heldout/maths/00000.ds.index")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tokens"), str(tmp_path / "older")]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
    answers = {
        "train": [HUNDRED_MILLION, 1_000_000, 1e6],
        "evaluate": [10_000, 10_000],
        "export": [60_000, 60_000],
        "positions": [48, 0],
    }
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(name, use) for name, use, *_ in found] == [(n, u) for n in ("tokens", "older") for u in answers]
    for name, use, answer, resident, allocated in found:
        print(f"{name}, {use}: resident {resident / 2**20:.1f} MiB, allocated {allocated / 2**20:.1f} MiB")
        assert answer == answers[use]
        assert resident < LIMIT_BYTES and allocated < LIMIT_BYTES, (name, use)
