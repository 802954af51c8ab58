"""Measures the exported files: speed and memory on each device, perplexity, and agreement with torch.

Everything that is timed runs in processes of its own: ``runtime_cpu.bench`` and ``runtime_cpu.perplexity`` as an
operator would call them. What one file's measurement gave is kept in scratch, so a killed stage goes on from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from components.artifacts import PROJECT, StageContext, StageError, once, parse_config, write_json
from components.corpus.shards import HELD_OUT_SPLIT, TokenShards
from components.devices.commands import engine_command
from components.devices.config import BenchmarkConfig
from components.devices.matrix import LOCAL, Device, DeviceUnavailable, read_matrix

PERPLEXITY_TYPES = ("f32", "f16", "q4_0")
SPEED_TYPES = ("f16", "q4_0")
_PRIMARY = "q4_0"


def run(context: StageContext) -> dict[str, float]:
    """Write ``bench.json`` and ``bench.png``; returns the headline metrics.

    Raises:
        StageError: an input is missing, this machine cannot run the files, the logits differ from torch's, or Q4_0
            costs more perplexity than allowed.
    """
    config = parse_config(BenchmarkConfig, context)
    devices = read_matrix(PROJECT / config.matrix)
    unknown = [name for name in config.devices if name not in devices]
    if unknown:
        raise StageError(
            f"benchmark.devices names {', '.join(unknown)}; the device matrix has {', '.join(devices)}"
        )
    files = find_files(context.inputs["export"])
    tokens, categories = heldout_tokens(
        TokenShards.open(context.inputs["tokenize"]), config.heldout_tokens, config.window_tokens
    )
    jobs = len(files) + 1 + len(config.devices) * len([kind for kind in SPEED_TYPES if kind in files])
    with tqdm(total=jobs, desc="benchmark", unit="job", file=sys.stderr) as bar:

        def step(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            bar.set_postfix_str(name)
            result = once(context.scratch / f"{name}.json", work)
            bar.update()
            return result

        agreement = step("agreement", lambda: _agreement(context, config, files, tokens))
        perplexity = {
            kind: step(f"perplexity-{kind}", lambda path=path: _perplexity(context, config, path, tokens))  # type: ignore[misc]
            for kind, path in files.items()
        }
        rows, machines = _measure(context, config, devices, files, perplexity, step)

    increase = None
    if "f32" in perplexity and _PRIMARY in perplexity:
        increase = perplexity[_PRIMARY]["perplexity"] / perplexity["f32"]["perplexity"] - 1
        if not increase <= config.max_q4_0_perplexity_increase:
            raise StageError(
                f"Q4_0 raises the perplexity by {increase:.1%}, from {perplexity['f32']['perplexity']:.3f} to "
                f"{perplexity[_PRIMARY]['perplexity']:.3f}; max_q4_0_perplexity_increase allows "
                f"{config.max_q4_0_perplexity_increase:.1%}"
            )
    _write(context, config, rows, machines, perplexity, agreement, increase, categories)
    return _headlines(rows, perplexity, agreement, increase)


def find_files(export: Path) -> dict[str, Path]:
    """The exported GGUF files by storage type.

    Raises:
        StageError: none of the types that are measured is there, or one is there twice.
    """
    found: dict[str, Path] = {}
    for kind in PERPLEXITY_TYPES:
        paths = sorted((export / "gguf").glob(f"*-{kind}.gguf"))
        if len(paths) > 1:
            raise StageError(
                f"the export holds several {kind} files: {', '.join(path.name for path in paths)}"
            )
        if paths:
            found[kind] = paths[0]
    if _PRIMARY not in found:
        raise StageError(f"the export {export} holds no gguf/*-{_PRIMARY}.gguf; run the export stage again")
    return found


def heldout_tokens(
    shards: TokenShards, count: int, window: int
) -> tuple[NDArray[np.integer], dict[str, int]]:
    """About ``count`` held-out tokens [T], in equal parts from each category, and how many each gave.

    Parts are whole windows, so that no window mixes categories.
    """
    categories = shards.categories(HELD_OUT_SPLIT)
    if not categories:
        raise StageError(
            f"the tokenized data have no {HELD_OUT_SPLIT} tokens; there is nothing to measure perplexity on"
        )
    share = max(count // len(categories) // window, 1) * window
    parts: dict[str, NDArray[np.integer]] = {}
    for category in categories:
        shard = shards.shard(HELD_OUT_SPLIT, category)
        whole = min(share, len(shard)) // window * window
        if whole:
            parts[category] = shard.read(0, whole)
    if not parts:  # tiny data: one short window is better than nothing
        longest = max(categories, key=lambda name: len(shards.shard(HELD_OUT_SPLIT, name)))
        shard = shards.shard(HELD_OUT_SPLIT, longest)
        parts[longest] = shard.read(0, min(len(shard), window))
    return np.concatenate(list(parts.values())), {name: len(part) for name, part in parts.items()}


def _agreement(
    context: StageContext, config: BenchmarkConfig, files: dict[str, Path], tokens: NDArray[np.integer]
) -> dict[str, Any]:
    if not config.check_tokens or "f32" not in files:
        return {}
    from components.devices.logit_comparison import compare_logits, torch_logits

    folder = context.inputs["merge"] / "model"
    part = tokens[: min(config.check_tokens, _context_length(folder))]
    ids, ours = context.scratch / "check.npy", context.scratch / "logits.npy"
    np.save(ids, part)
    engine_command("logits", [str(files["f32"]), str(ids), str(ours)], config.timeout_s)
    result = compare_logits(np.load(ours), torch_logits(folder, part))
    if not result.max_row_error <= config.max_logits_error:
        raise StageError(
            f"the engine's F32 logits are {result.max_row_error:.2e} from torch's (worst of {result.tokens} rows, "
            f"relative); at most {config.max_logits_error:.0e} is allowed: the export or the engine is wrong"
        )
    return asdict(result)


def _context_length(folder: Path) -> int:
    try:
        length: int = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"the merged model's {folder / 'config.json'} cannot be read: {error!r}") from error
    return length


def _perplexity(
    context: StageContext, config: BenchmarkConfig, path: Path, tokens: NDArray[np.integer]
) -> dict[str, Any]:
    ids = context.scratch / "heldout.npy"
    np.save(ids, tokens)
    window = min(config.window_tokens, len(tokens))
    output = engine_command(
        "perplexity", [str(path), str(ids), "--window", str(window), "--json"], config.timeout_s
    )
    result: dict[str, Any] = json.loads(output)
    return result


def _measure(
    context: StageContext,
    config: BenchmarkConfig,
    devices: dict[str, Device],
    files: dict[str, Path],
    perplexity: dict[str, dict[str, Any]],
    step: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    machines: dict[str, Any] = {}
    for name, device in devices.items():
        machines[name] = {"description": device.description, "status": "not run: not asked for"}
        if name not in config.devices:
            continue
        for kind in SPEED_TYPES:
            if kind not in files:
                continue
            try:  # around the step: a device that failed is asked again by the next attempt
                report = step(f"speed-{name}-{kind}", lambda d=device, p=files[kind]: _speed(d, p, config))  # type: ignore[misc]
            except DeviceUnavailable as error:
                if name == LOCAL:
                    raise StageError(f"the engine could not be measured here: {error}") from error
                context.note(f"{name} not run: {error}")
                machines[name]["status"] = f"not run: {error}"
                break
            machines[name] |= {
                "status": "measured",
                **{key: report[key] for key in ("machine", "versions", "read_bytes_per_s")},
            }
            rows += [_row(name, kind, report, row, perplexity[kind]) for row in report["rows"]]
    return rows, machines


def _speed(device: Device, path: Path, config: BenchmarkConfig) -> dict[str, Any]:
    return device.measure(
        path,
        runs=config.runs,
        prompt_tokens=config.prompt_tokens,
        decode_tokens=config.decode_tokens,
        timeout_s=config.timeout_s,
    )


def _row(
    device: str, kind: str, report: dict[str, Any], row: dict[str, Any], quality: dict[str, Any]
) -> dict[str, Any]:
    """One line of the device table: flat, with units in its names."""
    values: dict[str, Any] = {
        "device": device,
        "cpu": report["machine"]["cpu"],
        "cores": report["machine"]["cores"],
        "file": report["model"]["file"],
        "type": kind,
        "file_bytes": report["model"]["file_bytes"],
        "threads": row["threads"],
    }
    for key in ("prompt_tokens_per_s", "decode_tokens_per_s"):
        spread = row[key]
        values |= {key: spread["median"], f"{key}_low": spread["low"], f"{key}_high": spread["high"]}
    return values | {
        "runs": len(row["decode_tokens_per_s"]["runs"]),
        "first_token_s": row["first_token_s"]["median"],
        "peak_memory_bytes": row["peak_rss_bytes"],
        "weight_bytes_per_token": report["model"]["bytes_per_token"],
        "perplexity": quality["perplexity"],
        "bits_per_byte": quality["bits_per_byte"],
    }


def _write(
    context: StageContext,
    config: BenchmarkConfig,
    rows: list[dict[str, Any]],
    machines: dict[str, Any],
    perplexity: dict[str, dict[str, Any]],
    agreement: dict[str, Any],
    increase: float | None,
    categories: dict[str, int],
) -> None:
    from components.devices.figures import draw

    first = next(iter(perplexity.values()))
    title = (
        f"{context.recipe} on the CPU engine: {config.prompt_tokens} prompt and {config.decode_tokens} decoded tokens, "
        f"median and range of {config.runs} runs"
    )
    draw(context.out / "bench.png", rows, perplexity, title)
    write_json(
        context.out / "bench.json",
        {
            "devices": rows,
            "machines": machines,
            "perplexity": {"heldout_tokens": first["tokens"], "by_category": categories, "files": perplexity},
            "q4_0_perplexity_increase": increase,
            "logits_against_torch": agreement or None,
            "settings": config.model_dump(mode="json"),
        },
    )


def _headlines(
    rows: list[dict[str, Any]],
    perplexity: dict[str, dict[str, Any]],
    agreement: dict[str, Any],
    increase: float | None,
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for kind in SPEED_TYPES:
        here = [row for row in rows if row["type"] == kind and row["device"] == LOCAL]
        if here:
            best = max(here, key=lambda row: float(row["decode_tokens_per_s"]))
            metrics |= {
                f"{kind}_decode_tokens_per_s": best["decode_tokens_per_s"],
                f"{kind}_prompt_tokens_per_s": max(row["prompt_tokens_per_s"] for row in here),
                f"{kind}_first_token_s": min(row["first_token_s"] for row in here),
                f"{kind}_peak_memory_bytes": max(row["peak_memory_bytes"] for row in here),
            }
    for kind, result in perplexity.items():
        metrics |= {
            f"{kind}_perplexity": result["perplexity"],
            f"{kind}_bits_per_byte": result["bits_per_byte"],
        }
    if increase is not None:
        metrics["q4_0_perplexity_increase"] = increase
    if agreement:
        metrics["logits_error_against_torch"] = agreement["max_row_error"]
    return {name: float(value) for name, value in metrics.items()}
