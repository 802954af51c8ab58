"""``memory=`` is kept by the kernel's own count: a process under a memory cgroup of the same size, swap off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_cpu import pack, synth
from runtime_cpu.bench_machine import MachineError, MemoryCgroup
from tests.waiting import CEILING_S

ROOT = Path(__file__).parent.parent.parent
SHAPE = synth.Shape("promise", 6, 1024, 8, 2, 128, 24, 3, 512, 32000, 8192, 0, True, False)

_RUN = """
import json, sys
from runtime_cpu import Engine
from runtime_cpu.peak_memory import peak_resident_bytes
from runtime_cpu.synth import text_like_ids
path, memory, wanted = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = Engine.open(path, threads=2, memory=memory)
ids = text_like_ids(engine.info.vocab_size, 700, 1)
tokens, misses = 0, 0
while tokens < wanted:
    prompt = ids[tokens % 100 :][: min(600, engine.info.context - 40)]
    text = [token.id for token in engine.generate(prompt, 32, stop_ids=())]
    tokens += len(text)
    misses += engine.stats.cache_misses
    engine.tokenizer.decode(text)
plan = engine.info.plan
print(json.dumps({"peak": peak_resident_bytes(), "plan": plan.total_bytes, "offloads": plan.offloads, "tokens": tokens,
                  "misses": misses, "context": engine.info.context}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("promise")
    synth.write(folder / "stock.gguf", SHAPE)
    pack.pack(folder / "stock.gguf", folder / "packed.gguf")
    return folder / "packed.gguf"


def smallest_budget(model: Path) -> int:
    """What a process of its own would need: this one holds much else."""
    probe = (
        "import sys; from runtime_cpu import Engine, MemoryBudgetError\n"
        "try:\n    Engine.open(sys.argv[1], threads=2, memory=1)\n"
        "except MemoryBudgetError as error:\n    print(error.needed_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, str(model)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return int(done.stdout)


def run_under(limit: int, model: Path, tokens: int) -> dict[str, int]:
    try:
        group = MemoryCgroup(limit, f"memory-promise-{os.getpid()}")
    except MachineError as error:
        pytest.skip(str(error))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(model), str(limit), str(tokens)],
            capture_output=True,
            text=True,
            preexec_fn=group.enter,
            cwd=ROOT,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            timeout=CEILING_S + tokens,
        )
    finally:
        group.remove()
    assert done.returncode == 0, f"rc {done.returncode}: {done.stderr[-2000:]}"
    result: dict[str, int] = json.loads(done.stdout)
    return result


def test_a_budget_is_kept_under_a_cgroup(model: Path) -> None:
    smallest = smallest_budget(model)
    for limit in (smallest + (16 << 20), smallest + (60 << 20)):
        result = run_under(limit, model, 320)
        assert result["peak"] <= limit, "more resident memory than promised"
        assert result["plan"] <= limit
        assert result["offloads"] and result["misses"] > 0


def test_the_smallest_budget_is_enough_and_less_is_not(model: Path) -> None:
    probe = (
        "import sys; from runtime_cpu import Engine, MemoryBudgetError\n"
        "def needed(memory):\n"
        "    try:\n"
        "        Engine.open(sys.argv[1], threads=1, memory=memory).close()\n"
        "    except MemoryBudgetError as error:\n"
        "        return error.needed_bytes\n"
        "    return 0\n"
        "first = needed(1)\n"
        "assert first > 50 << 20, first\n"
        "assert needed(first + (8 << 20)) == 0\n"  # the interpreter has grown a little meanwhile
        "assert needed(first - (8 << 20)) > 0\n"
    )
    subprocess.run([sys.executable, "-c", probe, str(model)], check=True, timeout=CEILING_S, cwd=ROOT)


@pytest.mark.campaign
def test_long_answers_of_the_4b_within_one_gibibyte(tmp_path: Path) -> None:
    synth.write(tmp_path / "stock.gguf", synth.SHAPES["4b"])
    pack.pack(tmp_path / "stock.gguf", tmp_path / "packed.gguf")
    (tmp_path / "stock.gguf").unlink()
    result = run_under(1 << 30, tmp_path / "packed.gguf", 1000)
    assert result["peak"] <= 1 << 30 and result["offloads"] and result["misses"] > 0
