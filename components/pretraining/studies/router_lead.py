"""What it costs and what it buys when routers read the stream of earlier layers (``router_lead``).

``python -m components.pretraining.studies.router_lead TOKENS OUT --leads 0,1,2,4 --seeds 1,2,3`` trains the nano
recipe for every lead and seed on the tokenize artefact TOKENS (a finished run is not trained again), packs every model
and runs it with room for a third of its experts. It prints, and writes as ``router_lead.json`` into OUT, held-out bits
per byte, the experts' loads, and per token the megabytes read, the experts that were missing when their layer asked,
and the time that threads waited for them. Differences to lead 0 are paired by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from components.artifacts import PROJECT, StageContext, write_json
from components.corpus.shards import HELD_OUT_SPLIT, TokenShards
from components.measures.intervals import paired_interval_of_few
from components.measures.positions import document_beginnings
from components.pretraining.config import PretrainConfig
from components.pretraining.presets import PRESETS

_STAGE = "stage3"
_SHARE = 3  # one expert of so many has room
_DOCUMENT_TOKENS = 256


def lead_config(lead: int, seed: int, layers: int, tokens_ratio: float) -> PretrainConfig:
    """The nano recipe with a router lead, a seed, ``layers`` layers and a share of its tokens."""
    nano = PRESETS["nano"]().model_dump()
    kinds = [int(layer % 4 != 0) for layer in range(layers)]
    return PretrainConfig.model_validate(
        {
            **nano,
            "seed": seed,
            "stages": [
                {**stage, "tokens": round(stage["tokens"] * tokens_ratio)} for stage in nano["stages"]
            ],
            "model": {
                "preset": "nano",
                "overrides": {
                    "num_hidden_layers": layers,
                    "rope_layout": kinds,
                    "sliding_window_layout": kinds,
                    "router_lead": lead,
                },
            },
        }
    )


def train(tokens: Path, out: Path, config: PretrainConfig) -> dict[str, float]:
    """Train unless ``out`` holds the finished run; bits per byte, and the last loads of the experts (1: the mean)."""
    from components.pretraining.stage import run

    if not (out / "activation_stats.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        values = config.model_dump(mode="json")
        context = StageContext("pretrain", "nano", values, {"tokenize": tokens}, out, out / "cache")
        run(context)
        context.close()
    frequency_LE = np.array(json.loads((out / "activation_stats.json").read_text())["expert_frequency"])
    load_LE = frequency_LE / frequency_LE.mean(axis=1, keepdims=True)
    return {
        "bits_per_byte": json.loads((out / "heldout.json").read_text())[_STAGE]["overall"],
        "emptiest_expert": float(load_LE.min()),
        "fullest_expert": float(load_LE.max()),
    }


def read_documents(tokens: Path, count: int) -> list[npt.NDArray[np.int64]]:
    """The first held-out documents of at least 256 tokens, cut to that, in turn from every category."""
    shards = TokenShards.open(tokens)
    columns = [
        document_beginnings(shards.shard(HELD_OUT_SPLIT, name), shards.eos_id, _DOCUMENT_TOKENS, count)
        for name in shards.categories(HELD_OUT_SPLIT)
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*columns))
    return [row[1:] for row in in_turn if row is not None][:count]


def _engine(name: str, *arguments: str | Path) -> str:
    """Standard output of an engine's command."""
    command = [sys.executable, "-m", f"runtime_cpu.{name}", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT).stdout


def run_within_a_third(folder: Path, ids: Path, speculate: bool) -> dict[str, float]:
    """Feed token ids to the engine, with room for a third of the experts of a model's folder; figures per token."""
    packed = folder.resolve().with_suffix(".packed.gguf")
    if not packed.is_file():
        _engine("pack", folder.resolve(), packed, "--type", "q4_0")
    model = json.loads((folder / "config.json").read_text())
    room = model["num_hidden_layers"] * model["moe_num_primary_experts"] // _SHARE
    flags = [] if speculate else ["--no-speculate"]
    used = json.loads(
        _engine("reads", packed, ids, "--experts", str(room), "--window", str(_DOCUMENT_TOKENS), *flags)
    )
    return {
        "megabytes": used["bytes_per_token"] / 1e6,
        "missing_experts": used["missing_experts_per_token"],
        "wait_ms": used["wait_s_per_token"] * 1e3,
        "ms": used["s_per_token"] * 1e3,
    }


def table(results: dict[int, dict[int, dict[str, float]]]) -> str:
    """The measurements as text; ``results`` by lead and seed."""
    base = results[min(results)]
    names = {
        "bits_per_byte": "bits/byte",
        "emptiest_expert": "emptiest",
        "fullest_expert": "fullest",
        "guessing.megabytes": "MB",
        "guessing.missing_experts": "missing",
        "guessing.wait_ms": "wait ms",
        "plain.megabytes": "MB*",
        "plain.missing_experts": "missing*",
        "plain.wait_ms": "wait ms*",
    }
    lines = ["lead  n" + "".join(f"{name:>11}" for name in names.values()) + "   bits/byte against the first"]
    for lead, runs in results.items():
        means = "".join(f"{np.mean([run[key] for run in runs.values()]):>11.4f}" for key in names)
        seeds = [seed for seed in runs if seed in base]
        change, low, high = paired_interval_of_few(
            [runs[seed]["bits_per_byte"] for seed in seeds], [base[seed]["bits_per_byte"] for seed in seeds]
        )
        lines.append(f"{lead:>4}{len(runs):>3}{means}   {change:+.4f} ({low:+.4f} to {high:+.4f})")
    return "\n".join([*lines, "per token, experts within a third of their bytes; *: without guesses"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", type=Path, metavar="TOKENS", help="artefact of stage tokenize")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for trainings and results")
    parser.add_argument("--leads", default="0,1,2,4", help="router leads; differences are to the first")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--layers", type=int, default=4, help="of the model; the recipe's are 4")
    parser.add_argument("--tokens-ratio", type=float, default=1.0, help="share of the recipe's tokens")
    parser.add_argument("--documents", type=int, default=24, help="held-out texts that the engine reads")
    options = parser.parse_args(arguments)
    leads = [int(lead) for lead in options.leads.split(",")]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    ids = (options.out / "documents.npy").resolve()
    np.save(ids, np.concatenate(read_documents(options.tokens, options.documents)).astype(np.int32))
    results: dict[int, dict[int, dict[str, float]]] = {lead: {} for lead in leads}
    for seed in seeds:
        for lead in leads:
            folder = options.out / f"lead{lead}-seed{seed}"
            config = lead_config(lead, seed, options.layers, options.tokens_ratio)
            figures = train(options.tokens, folder, config)
            for name, speculate in (("guessing", True), ("plain", False)):
                used = run_within_a_third(folder / _STAGE, ids, speculate)
                figures |= {f"{name}.{key}": value for key, value in used.items()}
            results[lead][seed] = figures
    write_json(options.out / "router_lead.json", results)
    sys.stdout.write(table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
