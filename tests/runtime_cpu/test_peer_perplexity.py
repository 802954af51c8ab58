"""Perplexity of the same files in llama.cpp and here: ``pip install 'smallthinker[peer]'``, else it is skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime_cpu import Engine
from runtime_cpu.bench.worker import Peer
from runtime_cpu.commands.perplexity import surprise

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed here: pip install 'smallthinker[peer]'")

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "gguf"


def peer_logits(path: Path, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Row by row: its convenient functions give out the last token's logits only."""
    peer = Peer(str(path), threads=1, context=len(ids), repack=True)
    rows = np.empty((len(ids), peer.vocab_size), np.float32)
    for i in range(len(ids)):
        peer.compute(ids[i : i + 1])
        rows[i] = np.ctypeslib.as_array(peer.lib.llama_get_logits_ith(peer.context, -1), (peer.vocab_size,))
    return rows


@pytest.mark.parametrize("size", ["tiny-21b", "tiny-4b"])
@pytest.mark.parametrize(("kind", "share"), [("f32", 2e-4), ("q8_0", 2e-3), ("q4_0", 2e-3)])
def test_the_same_file_surprises_both_alike(size: str, kind: str, share: float) -> None:
    """Within ``share`` of llama.cpp's logarithm of it, and nearer to that of exact arithmetic.

    Random weights are sure of themselves: the 4B's 29 nats are no perplexity that a ratio would suit.
    """
    golden = np.load(GOLDEN / f"{size}-{kind}.npz")
    ids = golden["input_ids"].astype(np.int32)
    path = GOLDEN / f"{size}-{kind}.gguf"
    with Engine.open(path, threads=1, context=128) as engine:
        rows = {"ours": engine.logits(ids), "theirs": peer_logits(path, ids)}
    rows["exact"] = golden["logits_exact"]
    nats = {name: float(surprise(logits[:-1], ids[1:]).mean()) for name, logits in rows.items()}
    assert nats["ours"] == pytest.approx(nats["theirs"], rel=share)
    assert abs(nats["ours"] - nats["exact"]) <= max(abs(nats["theirs"] - nats["exact"]), 1e-5)
    # It could differ: text in another order is another perplexity.
    other = float(surprise(rows["ours"][:-1], np.roll(ids, 7)[1:]).mean())
    assert other != pytest.approx(nats["theirs"], rel=5 * share)
