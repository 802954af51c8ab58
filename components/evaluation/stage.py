"""The stage ``evaluate``: lm-eval on the base, the post-trained and the merged model, and routing statistics.

Writes ``results.json`` (``{model: {task: {metric, value, ci_low, ci_high, n, chance}}}``),
``activation_stats.json``, ``heatmap.png`` and ``sparsity.png`` (of the merged model), and ``samples/`` with what
each model answered. A killed run keeps the models it had finished.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from components.artifacts import StageContext, StageError, once, parse_config, write_atomically, write_json
from components.evaluation.activations import HeldOutText, measure
from components.evaluation.config import EvaluateConfig, LocalTask
from components.evaluation.figures import draw_heatmap, draw_sparsity
from components.evaluation.harness import evaluate_tasks, language_model, local_cells, stock_cells
from components.evaluation.lm_eval_tasks import TaskForm, read_index, write_tasks
from components.evaluation.sandbox import SandboxError, probe
from components.weights.devices import choose_device
from components.weights.model_folders import load_model
from model import SmallThinkerForCausalLM

MODELS: tuple[tuple[str, str, str], ...] = (
    ("base", "pretrain", "stage3"),
    ("posttrain", "posttrain", "model"),
    ("merged", "merge", "model"),
)
"""Name in ``results.json``, parent, and the model's folder there."""
STATISTICS_OF = "merged"


def _load(folder: Path, config: EvaluateConfig) -> tuple[SmallThinkerForCausalLM, Any]:
    """A checkpoint and its tokenizer, ready to score.

    Raises:
        StageError: the folder does not hold them, or the device is not there.
    """
    model = load_model(folder, choose_device(config.device), getattr(torch, config.dtype))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise StageError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise StageError(f"the tokenizer in {folder} has no chat template; evaluation asks through it")
    return model, tokenizer


def _evaluate_model(
    name: str, folder: Path, context: StageContext, config: EvaluateConfig, forms: dict[LocalTask, TaskForm]
) -> dict[str, Any]:
    """All figures of one model; statistics and pictures too for the one they are kept of."""
    model, tokenizer = _load(folder, config)
    lm = language_model(model, tokenizer, config)
    metrics, samples = evaluate_tasks(lm, context.scratch / "tasks", forms)
    index = read_index(context.inputs["evalsets"])
    unsafe = probe() if any(index[form.set_name]["kind"] == "code" for form in forms.values()) else None
    cells = local_cells(forms, metrics, samples, index, config, unsafe)
    if unsafe is not None:
        context.note(f"programs written by the models were not executed: {unsafe}")
    if config.stock_tasks:
        cells |= stock_cells(lm, config, chat=name != "base" and config.chat_stock_tasks)
    lines = [
        json.dumps(_brief(task, sample), ensure_ascii=False)
        for task, members in samples.items()
        for sample in members[:5]
    ]
    write_atomically(context.out / "samples" / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())

    text = HeldOutText.open(context.inputs["tokenize"], config)
    total = sum(len(stream) for stream in text.streams.values())
    with tqdm(total=total, desc=f"{name}: held-out text", unit="tok", file=sys.stderr, disable=None) as bar:
        held_out, routing = measure(model, text, config, progress=bar.update)
    cells |= {f"heldout_{category}": cell for category, cell in held_out.items()}
    extra: dict[str, float] = {}
    if name == STATISTICS_OF:
        statistics = routing.to_json()
        write_json(context.out / "activation_stats.json", statistics)
        draw_heatmap(routing, context.out / "heatmap.png")
        draw_sparsity(routing, context.out / "sparsity.png")
        extra = {
            "mean_neuron_sparsity": routing.mean_sparsity,
            "cold_expert_share": float(sum(statistics["cold_expert_share"]) / routing.layers),
            "temporal_locality": float(sum(statistics["temporal_locality"]) / routing.layers),
        }
    return {"cells": cells, "extra": extra}


def _brief(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants of one of lm-eval's samples: the question, the right answer and the model's."""
    arguments = sample["arguments"]
    named = isinstance(arguments, Mapping)  # lm-eval names logged arguments
    prompt = arguments["gen_args_0"]["arg_0"] if named else arguments[0][0]
    responses = sample["filtered_resps"]
    return {
        "task": task,
        "id": sample["doc"]["id"],
        "prompt": prompt,
        "target": sample["target"],
        "response": [str(response) for response in responses],
    }


def run(context: StageContext) -> dict[str, float]:
    """Evaluate the three models.

    Raises:
        StageError: the configuration is wrong, or a parent's files are missing or malformed.
    """
    config = parse_config(EvaluateConfig, context)
    if not config.stock_tasks:
        # Nothing here needs a hub: libraries must not wait for one.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    forms = write_tasks(context.scratch / "tasks", context.inputs["evalsets"], config.tasks, config)
    results: dict[str, dict[str, Any]] = {}
    headline: dict[str, float] = {}
    for name, parent, folder in MODELS:
        try:
            outcome = once(
                context.scratch / f"{name}.json",
                lambda name=name, parent=parent, folder=folder: _evaluate_model(  # type: ignore[misc]
                    name, context.inputs[parent] / folder, context, config, forms
                ),
            )
        except SandboxError as error:
            raise StageError(str(error)) from error
        results[name] = outcome["cells"]
        headline |= outcome["extra"]
        headline |= {f"{name}_{task}": cell["value"] for task, cell in outcome["cells"].items()}
        if "topic" in outcome["cells"]:
            headline[f"{name}_topic_accuracy"] = outcome["cells"]["topic"]["value"]
    write_json(context.out / "results.json", results)
    return headline
