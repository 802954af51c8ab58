"""What a model file holds and what running it costs: ``python -m runtime_cpu.inspect FILE [--memory 1GiB] [--json]``.

Nothing is computed and no weight is read: metadata, the tensors' entries, and the plan that ``Engine.open`` would make.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime_cpu import _core
from runtime_cpu._core import TokenType
from runtime_cpu.console import add_kv_option
from runtime_cpu.engine.head_predictor import HeadPredictorInfo
from runtime_cpu.engine.options import CHUNK_TOKENS, MAX_THREADS, model_file
from runtime_cpu.memory.plan import MemoryBudgetError, MemoryPlan, format_bytes, parse_bytes
from runtime_cpu.memory.planner import Planner, preload
from runtime_cpu.memory.traffic import kv_bytes, skips_silent_neurons, weight_bytes

# The paper's mean over layers (arXiv 2507.20984, section 5.1).
DEFAULT_SPARSITY = 0.62
_FORMAT_VERSION = 1
_LAYOUT_KEY = re.compile(r"pack|checksum|sha256|digest|format_version")
_MAX_VALUE_CHARACTERS = 96


class InspectError(Exception):
    """An option is unusable; the message says why."""


def inspect(
    path: Path,
    memory: int | None = None,
    context: int | None = None,
    threads: int | None = None,
    sparsity: float = DEFAULT_SPARSITY,
    kv_type: str = "auto",
) -> dict[str, Any]:
    """Everything that the command prints, as a JSON-ready object; sizes in bytes.

    Args:
        memory: the budget in bytes; without one the plan is that of an engine which may use all it wants.
        context, threads, kv_type: as :meth:`Engine.open` takes them.
        sparsity: share of silent neurons (:func:`runtime_cpu.memory.traffic.weight_bytes`).

    Raises:
        FileNotFoundError: no such file, or a folder.
        ModelFileError: the file is damaged, or no SmallThinker model.
        InspectError: an argument is out of its range.
    """
    model_file(path)
    if not 0 <= sparsity <= 1:
        raise InspectError(f"--sparsity is {sparsity}; allowed is 0 to 1")
    threads = 1 if threads is None else threads
    if not 1 <= threads <= MAX_THREADS:
        raise InspectError(f"--threads is {threads}; allowed is 1 to {MAX_THREADS}")
    model = _core.Model.open(str(path))
    if context is not None and not 1 <= context <= model.context_length:
        raise InspectError(f"--context is {context}; allowed is 1 to {model.context_length}")
    plan = _memory(
        model, memory, context, threads, kv_type
    )  # first: nothing is loaded that an engine would not
    metadata = model.metadata()
    tensors = model.tensors()
    by_type: dict[str, dict[str, int]] = {}
    for _name, kind, _shape, _offset, size in tensors:
        entry = by_type.setdefault(kind, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += size
    length = context or model.context_length
    skips = skips_silent_neurons(model)
    return {
        "format_version": _FORMAT_VERSION,
        "file": {
            "path": str(path),
            "bytes": model.file_bytes,
            "layout": _layout(metadata, [name for name, *_ in tensors]),
            "keys": {
                key: value
                for key, value in metadata.items()
                if _LAYOUT_KEY.search(key) and isinstance(value, str | int | float | bool)
            },
            "warnings": list(model.warnings),
        },
        "model": {
            "name": metadata.get("general.name"),
            "parameters": model.parameters,
            "file_type": model.file_type,
            **{
                name: getattr(model, name)
                for name in (
                    "layers",
                    "hidden",
                    "heads",
                    "kv_heads",
                    "head_dim",
                    "experts",
                    "experts_per_token",
                    "expert_hidden",
                    "vocab_size",
                    "context_length",
                    "window",
                    "rope_theta",
                    "rms_epsilon",
                    "router",
                    "router_lead",
                    "tied_embeddings",
                    "rope_layout",
                    "sliding_window_layout",
                )
            },
        },
        "head_predictor": model.head_predictor,
        "tensors": {"by_type": by_type, "by_part": _parts(tensors)},
        "tokenizer": _tokenizer(metadata),
        "memory": plan,
        "per_token": {
            "dense_bytes": weight_bytes(model),
            "sparsity": sparsity,
            "skips_silent_neurons": skips,
            "sparse_bytes": weight_bytes(model, sparsity if skips else 0.0),
            "length_tokens": length,
            "kv_type": kv_type,
            "kv_bytes": kv_bytes(model, length, kv_type),
        },
    }


def _layout(metadata: Mapping[str, Any], names: Sequence[str]) -> str:
    stock = any(name.endswith("ffn_down_exps.weight") for name in names)
    packed_key = any("packed" in key for key in metadata)
    return "stock" if stock and not packed_key else "packed"


def _parts(tensors: Sequence[tuple[str, str, tuple[int, ...], int, int]]) -> dict[str, dict[str, Any]]:
    """Tensors of all layers with the same role together: count, bytes, type and the shape of one."""
    parts: dict[str, dict[str, Any]] = {}
    for name, kind, shape, _offset, size in tensors:
        role = re.sub(r"^blk\.\d+\.", "blk.*.", name)
        entry = parts.setdefault(role, {"tensors": 0, "bytes": 0, "types": [], "shape": list(shape)})
        entry["tensors"] += 1
        entry["bytes"] += size
        if kind not in entry["types"]:
            entry["types"].append(kind)
    return parts


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    types = metadata.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    special = {
        str(text): index
        for index, (text, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == TokenType.CONTROL
    }
    return {
        "model": metadata.get("tokenizer.ggml.model"),
        "pre": metadata.get("tokenizer.ggml.pre"),
        "tokens": len(tokens),
        "merges": len(metadata.get("tokenizer.ggml.merges") or []),
        "control_tokens": special,
        "chat_template": metadata.get("tokenizer.chat_template") is not None,
    }


def _memory(
    model: _core.Model, budget: int | None, context: int | None, threads: int, kv_type: str
) -> dict[str, Any]:
    """The plan of ``Engine.open`` with its other defaults, by part, and the smallest budget that would do.

    Without a budget it counts the tokenizer too, which an engine then loads when it is asked for.
    """
    tokenizer = preload(model)  # noqa: F841 - held until the plan is made

    def fit(limit: int | None) -> tuple[int, int, MemoryPlan]:
        planner = Planner(model, threads, kv_type, CHUNK_TOKENS, "auto", limit)
        return planner.fit(context, None)

    try:
        fit(1)
        smallest = 1
    except MemoryBudgetError as error:
        smallest = error.needed_bytes
    try:
        fitted, sessions, plan = fit(budget)
    except MemoryBudgetError as error:
        return {
            "budget_bytes": budget,
            "smallest_budget_bytes": smallest,
            "fits": False,
            "reason": str(error),
        }
    sizes = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name.endswith("_bytes") and field.name != "budget_bytes"
    }
    return {
        "budget_bytes": budget,
        "smallest_budget_bytes": smallest,
        "fits": True,
        "context": fitted,
        "sessions": sessions,
        "threads": threads,
        "parts": sizes,
        "total_bytes": plan.total_bytes,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    file, model, tokenizer = report["file"], report["model"], report["tokenizer"]
    keys = {key: value for key, value in file["keys"].items() if "checksum" not in key}
    checksums = len(file["keys"]) - len(keys)
    lines = [
        f"{file['path']}: {format_bytes(file['bytes'])}, {file['layout']} layout",
        *(f"  {key}: {str(value)[:_MAX_VALUE_CHARACTERS]}" for key, value in keys.items()),
        *([f"  {checksums} checksums (--json shows them)"] if checksums else []),
        *(f"  warning: {text}" for text in file["warnings"]),
        "",
        f"model       {model['name'] or 'without a name'}: {model['parameters'] / 1e6:,.1f} M parameters, "
        f"{model['file_type']}",
        f"layers      {model['layers']} of hidden size {model['hidden']}; {_layers(model)}",
        f"attention   {model['heads']} heads, {model['kv_heads']} for keys and values, head size {model['head_dim']}; "
        f"RoPE theta {model['rope_theta']:g}; context {model['context_length']}",
        f"experts     {model['experts']}, {model['experts_per_token']} per token, {model['expert_hidden']} neurons "
        f"each; {model['router']} router",
        f"vocabulary  {model['vocab_size']} ids; head {'tied to' if model['tied_embeddings'] else 'apart from'} the "
        "embedding",
    ]
    if report["head_predictor"] is not None:
        lines.append(
            f"head        can be predicted (head='predictor'): {HeadPredictorInfo(**report['head_predictor'])}"
        )
    if tokenizer is None:
        lines.append("tokenizer   none in the file")
    else:
        template = "with" if tokenizer["chat_template"] else "without"
        lines.append(
            f"tokenizer   {tokenizer['model']}/{tokenizer['pre']}, {tokenizer['tokens']} tokens, "
            f"{tokenizer['merges']} merges, {len(tokenizer['control_tokens'])} control tokens, "
            f"{template} a chat template"
        )
    lines += ["", f"{'tensors':<30} {'count':>5} {'type':<10} {'shape':<22} {'size':>12}"]
    for role, part in report["tensors"]["by_part"].items():
        shape = " x ".join(map(str, part["shape"]))
        lines.append(
            f"{role:<30} {part['tensors']:>5} {'/'.join(part['types']):<10} {shape:<22} "
            f"{format_bytes(part['bytes']):>12}"
        )
    kinds = ", ".join(
        f"{kind} {entry['tensors']} tensors {format_bytes(entry['bytes'])}"
        for kind, entry in report["tensors"]["by_type"].items()
    )
    lines += [f"by type: {kinds}", "", *_memory_lines(report["memory"])]
    token = report["per_token"]
    sparse = (
        f"when every neuron is read, {format_bytes(token['sparse_bytes'])} when {token['sparsity']:.0%} are at zero"
        if token["skips_silent_neurons"]
        else "(silent neurons are read too: only those of Q4_0 experts are skipped)"
    )
    lines += [
        "",
        f"reads per token: {format_bytes(token['dense_bytes'])} of weights {sparse}; "
        f"and {format_bytes(token['kv_bytes'])} of keys and values ({token['kv_type']}) after "
        f"{token['length_tokens']} tokens",
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(memory: Mapping[str, Any]) -> list[str]:
    smallest = f"smallest budget: {format_bytes(memory['smallest_budget_bytes'])}"
    if not memory["fits"]:
        return [f"memory      does not fit: {memory['reason']}", smallest]
    budget = memory["budget_bytes"]
    limit = "without a budget" if budget is None else f"of {format_bytes(budget)}"
    parts = [
        f"  {name.removesuffix('_bytes').replace('_', ' '):<14} {format_bytes(size):>12}"
        for name, size in memory["parts"].items()
    ]
    plural = "s" if memory["sessions"] > 1 else ""
    return [
        f"memory      {format_bytes(memory['total_bytes'])} {limit}: context {memory['context']}, "
        f"{memory['sessions']} session{plural}, {memory['threads']} threads",
        *parts,
        smallest,
    ]


def _layers(model: Mapping[str, Any]) -> str:
    """Layers by kind, such as ``13 global without RoPE (0, 4, 8, ...)``."""
    kinds: dict[str, list[int]] = {}
    layouts = zip(model["rope_layout"], model["sliding_window_layout"], strict=True)
    for index, (rope, windowed) in enumerate(layouts):
        seen = f"windowed ({model['window']} keys)" if windowed else "global"
        kinds.setdefault(f"{seen} {'with' if rope else 'without'} RoPE", []).append(index)
    if len(kinds) == 1:
        return f"all {next(iter(kinds))}"
    return ", ".join(
        f"{len(layers)} {kind} ({', '.join(map(str, layers[:3]))}{', …' if len(layers) > 3 else ''})"
        for kind, layers in kinds.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 2: the file or an option is unusable; 1: it does not fit into ``--memory``."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.inspect",
        description="Show what a model file holds and what running it costs.",
    )
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--memory", help="budget for everything, such as 1GiB")
    parser.add_argument("--context", type=int, help="tokens per sequence (default: as much as fits)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--sparsity",
        type=float,
        default=DEFAULT_SPARSITY,
        help="share of neurons at zero (default: %(default)s)",
    )
    add_kv_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        memory = None if options.memory is None else parse_bytes(options.memory)
        report = inspect(options.file, memory, options.context, options.threads, options.sparsity, options.kv)
    except (OSError, ValueError, _core.EngineError, InspectError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(report, indent=2) + "\n" if options.json else table(report))
    return 0 if report["memory"]["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
