"""What it costs and what it buys when routers read the stream of earlier layers (``router_lead``).

``python -m components.pretraining.studies.router_lead TOKENS OUT --leads 0,1,2,4 --seeds 1,2,3`` trains the nano
recipe for every lead and seed on the tokenize artefact TOKENS (a finished run is not trained again), packs every model
and runs it with room for a third of its experts. It prints, and writes as ``router_lead.json`` into OUT, held-out bits
per byte, the experts' loads, and per token the megabytes read, the experts that were missing when their layer asked,
and the time that threads waited for them. Differences to lead 0 are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.artifacts import StageContext, write_json
from components.corpus.shards import HELD_OUT_SPLIT, TokenShards
from components.measures.intervals import paired_interval_of_few
from components.pretraining.config import PretrainConfig
from components.pretraining.presets import PRESETS

if TYPE_CHECKING:
    from runtime_cpu import Engine

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


def read_documents(tokens: Path, count: int) -> list[list[int]]:
    """The first held-out documents of at least 256 tokens, cut to that, in turn from every category."""
    shards = TokenShards.open(tokens)
    found: list[list[int]] = []
    streams = [shards.shard(HELD_OUT_SPLIT, name).documents() for name in shards.categories(HELD_OUT_SPLIT)]
    while streams and len(found) < count:
        stream = streams.pop(0)
        for document in stream:
            if len(document) >= _DOCUMENT_TOKENS:
                found.append(document[:_DOCUMENT_TOKENS].tolist())
                streams.append(stream)
                break
    return found[:count]


def pack_model(folder: Path) -> Path:
    """The model of a folder as the engine's packed file, beside it."""
    from runtime_cpu.pack.__main__ import main as pack

    packed = folder.with_suffix(".packed.gguf")
    if not packed.is_file() and pack([str(folder), str(packed), "--type", "q4_0"]) != 0:
        raise RuntimeError(f"{folder} could not be packed")
    return packed


def run_within_a_third(packed: Path, documents: Sequence[Sequence[int]], speculate: bool) -> dict[str, float]:
    """Feed ``documents`` token by token to the engine with room for a third of the experts; figures per token."""
    from runtime_cpu import Engine

    settings: dict[str, Any] = {"threads": 2, "context": _DOCUMENT_TOKENS, "sessions": 1, "chunk_tokens": 1}
    with Engine.open(packed, **settings) as engine:
        room = engine.info.plan.experts // _SHARE
    with Engine.open(packed, experts_in_memory=room, speculate=speculate, **settings) as engine:
        return _per_token(engine, documents)


def _per_token(engine: Engine, documents: Sequence[Sequence[int]]) -> dict[str, float]:
    total = {"megabytes": 0.0, "missing_experts": 0.0, "wait_ms": 0.0, "ms": 0.0}
    for document in documents:
        engine.logits(document)
        used = engine.stats
        total["megabytes"] += used.bytes_read / 1e6
        total["missing_experts"] += used.cache_misses
        total["wait_ms"] += used.io_wait_s * 1e3
        total["ms"] += used.prompt_s * 1e3
    tokens = sum(map(len, documents))
    return {name: value / tokens for name, value in total.items()}


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
    documents = read_documents(options.tokens, options.documents)
    results: dict[int, dict[int, dict[str, float]]] = {lead: {} for lead in leads}
    for seed in seeds:
        for lead in leads:
            folder = options.out / f"lead{lead}-seed{seed}"
            config = lead_config(lead, seed, options.layers, options.tokens_ratio)
            figures = train(options.tokens, folder, config)
            packed = pack_model(folder / _STAGE)
            for name, speculate in (("guessing", True), ("plain", False)):
                used = run_within_a_third(packed, documents, speculate)
                figures |= {f"{name}.{key}": value for key, value in used.items()}
            results[lead][seed] = figures
    write_json(options.out / "router_lead.json", results)
    sys.stdout.write(table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
