"""The export stage: from the merged model to files that other programs read. ``run(context)``.

Writes ``hf/`` (official folder), ``gguf/<recipe>-<precision>.gguf``, ``onnx/model.onnx`` and
``verification.json``, which compares each of them with the merged model. Everything appears by a rename; a
killed run starts over what it lacks.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from components.artifacts import StageContext, StageError, parse_config, read_manifest, write_json
from components.corpus.shards import TOKENIZER_FOLDER
from components.export.config import ExportConfig, HeadPredictorConfig
from components.export.gguf_file import ActivationStats, GGUFModel, stock_layout_limit, write_gguf
from components.export.head_predictor import HeadPredictor, split_parts, train
from components.export.head_states import collect_states, head_weight, shard_streams, split_windows
from components.export.huggingface import exported_config, find_tokenizer, model_card, write_folder
from components.export.onnx_graph import compare_onnx, export_onnx
from components.export.verification import (
    compare_tensors,
    describe_files,
    model_from_gguf,
    reference_logits,
    row_errors,
    sample_batch,
)
from components.export.vocabulary import read_vocabulary
from components.weights.model_folders import load_model
from model import CheckpointError, OfficialCheckpoint, SmallThinkerConfig
from model.accounting import count_parameters


def run(context: StageContext) -> dict[str, float]:
    """Export the merged model.

    Reads ``merge/model``, ``evaluate/activation_stats.json`` and ``tokenize/tokenizer``.

    Raises:
        StageError: an input is missing or torn, or a file does not reproduce the model.
    """
    config = parse_config(ExportConfig, context)
    torch.set_num_threads(config.threads)
    source = context.inputs["merge"] / "model"
    try:
        checkpoint = OfficialCheckpoint(source)
    except CheckpointError as error:
        raise StageError(f"The merged model cannot be read: {error}") from error
    published = exported_config(checkpoint.config, config.max_position_embeddings)
    tokenizer = find_tokenizer(source, context.inputs["tokenize"] / TOKENIZER_FOLDER)
    stats = _read_stats(context.inputs["evaluate"] / "activation_stats.json", published)
    name = f"smallthinker-{context.recipe}"

    parameters = count_parameters(published).total
    with tqdm(total=1 + len(config.gguf) + int(config.onnx), desc="export", unit="file") as bar:
        _write_huggingface(context, config, checkpoint, published, tokenizer, name)
        bar.update()
        vocabulary = read_vocabulary(tokenizer, published.vocab_size)
        paths: dict[str, Path] = {
            kind: context.out / "gguf" / f"{context.recipe}-{kind}.gguf" for kind in config.gguf
        }
        predictor = None
        if config.head_predictor is not None:
            # Never two models in memory: this one is gone before the files are compared.
            predictor = _train_predictor(context, config, config.head_predictor, parameters)
        write_gguf(
            checkpoint, paths, name, vocabulary, stats, config.q4_0_output, published, predictor=predictor
        )
        bar.update(len(paths))
        report: dict[str, Any] = {"parameters": parameters, "gguf": {}}
        if predictor is not None:
            report["head_predictor"] = predictor.report
        for kind, path in paths.items():
            report["gguf"][kind] = {"weights": compare_tensors(checkpoint, GGUFModel(path))}
        if parameters <= config.verify_max_parameters:
            _compare_logits(context, config, published, paths, report)
            bar.update(int(config.onnx))
        else:
            context.note(
                f"{parameters:,} parameters: files were compared tensor by tensor, not by their logits."
            )

    limit = stock_layout_limit(published)
    report["stock_llama_cpp_exact_tokens"] = limit
    if limit is not None:
        context.note(
            f"llama.cpp ignores the layouts and window of this model: it computes the same up to {limit} tokens. "
            "Our engine reads both from the file."
        )
    report["files"] = describe_files(context.out)
    report["files"].pop("verification.json", None)
    report["files"].pop("metrics.jsonl", None)
    _judge(report)
    write_json(context.out / "verification.json", report)
    return _headline(report, context.recipe)


def _train_predictor(
    context: StageContext, config: ExportConfig, part: HeadPredictorConfig, parameters: int
) -> HeadPredictor:
    """Train on states of the merged model over the held-out split, which the model did not learn from."""
    parts = split_parts(part)
    # No more of a category than this is ever cut into windows.
    streams = shard_streams(context.inputs["tokenize"], max(part.positions, len(parts) * part.window))
    windows = split_windows(streams, part.positions, part.window, parts)
    dtype: torch.dtype | Literal["auto"] = (
        torch.float32 if parameters <= config.verify_max_parameters else "auto"
    )
    network = load_model(context.inputs["merge"] / "model", dtype=dtype)
    fit, held, test = (collect_states(network, rows) for rows in windows)
    head = head_weight(network)
    del network
    predictor = train(head, (fit, held, test), part, config.seed)
    context.note(
        f"The GGUF files hold a predictor of output rows, which is only used when it is asked for: on "
        f"{len(test):,} held-out positions it misses {predictor.report['missed_argmax']:.2%} of the most probable "
        f"tokens and reads {predictor.report['active_rows']:.1%} of the rows."
    )
    return predictor


def _read_stats(path: Path, config: SmallThinkerConfig) -> ActivationStats:
    try:
        contents = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing; the evaluation writes it.") from error
    except ValueError as error:
        raise StageError(f"{path} is not valid JSON: {error}.") from error
    return ActivationStats.parse(contents, config)


def _write_huggingface(
    context: StageContext,
    config: ExportConfig,
    checkpoint: OfficialCheckpoint,
    published: SmallThinkerConfig,
    tokenizer: Path,
    name: str,
) -> None:
    draft, target = context.scratch / "hf", context.out / "hf"
    shutil.rmtree(draft, ignore_errors=True)
    write_folder(checkpoint, tokenizer, draft, published, config.hf_dtype, config.shard_bytes)
    metrics = {}
    for role in ("merge", "evaluate"):
        manifest = read_manifest(context.inputs[role])
        if manifest is not None:
            metrics[manifest.stage] = manifest.metrics
    (draft / "README.md").write_text(model_card(name, published, metrics))
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


def _compare_logits(
    context: StageContext,
    config: ExportConfig,
    published: SmallThinkerConfig,
    paths: dict[str, Path],
    report: dict[str, Any],
) -> None:
    source = context.inputs["merge"] / "model"
    memory = load_model(source)
    ids, mask = sample_batch(published.vocab_size, config.verify_tokens, config.seed)
    expected = reference_logits(memory, ids)
    reloaded = load_model(context.out / "hf")
    report["hf"] = {"logits": row_errors(reference_logits(reloaded, ids), expected)}
    del reloaded
    for kind, path in paths.items():
        found = reference_logits(model_from_gguf(GGUFModel(path)), ids)
        report["gguf"][kind]["logits"] = row_errors(found, expected)
    if not config.onnx:
        return
    parameters = count_parameters(published).total
    if parameters > config.onnx_max_parameters:
        context.note(f"No ONNX graph: {parameters:,} parameters exceed {config.onnx_max_parameters:,}.")
        return
    draft, target = context.scratch / "onnx", context.out / "onnx"
    shutil.rmtree(draft, ignore_errors=True)
    export_onnx(memory, draft / "model.onnx")
    batches = [(ids[:1, :1], mask[:1, :1]), (ids[:1, :7], mask[:1, :7]), (ids, mask)]
    worst = compare_onnx(memory, draft / "model.onnx", batches)
    report["onnx"] = {"logits": {"max_abs": worst}, "shapes": [list(batch[0].shape) for batch in batches]}
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


def _judge(report: dict[str, Any]) -> None:
    """Refuse files that do not reproduce the model."""
    f32 = report["gguf"].get("f32")
    if f32 is not None and f32["weights"]["max_abs"] > 0.0:
        raise StageError(
            f"The f32 GGUF file differs from the model by {f32['weights']['max_abs']:g}; it must be equal."
        )
    checks = {
        "f32 GGUF file": (f32 or {}).get("logits", {}).get("median_row", 0.0),
        "ONNX graph": report.get("onnx", {}).get("logits", {}).get("max_abs", 0.0),
    }
    for label, error in checks.items():
        if not error <= 1e-3:
            raise StageError(
                f"The {label}'s logits differ from the model's by {error:g}; at most 0.001 is allowed."
            )


def _headline(report: dict[str, Any], recipe: str) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for kind, entry in report["gguf"].items():
        metrics[f"gguf_{kind}_bytes"] = report["files"][f"gguf/{recipe}-{kind}.gguf"]["bytes"]
        metrics[f"gguf_{kind}_weight_rms_error"] = entry["weights"]["relative_rms"]
        if "logits" in entry:
            metrics[f"gguf_{kind}_logit_row_error"] = entry["logits"]["median_row"]
            metrics[f"gguf_{kind}_top1_agreement"] = entry["logits"]["top1_agreement"]
    for key in ("recall", "missed_argmax", "active_rows") if "head_predictor" in report else ():
        metrics[f"head_predictor_{key}"] = report["head_predictor"][key]
    if "hf" in report:
        metrics["hf_logit_max_error"] = report["hf"]["logits"]["max_abs"]
    if "onnx" in report:
        metrics["onnx_logit_max_error"] = report["onnx"]["logits"]["max_abs"]
    return {key: float(value) for key, value in metrics.items()}
