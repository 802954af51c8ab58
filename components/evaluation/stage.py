"""The stage ``evaluate``: lm-eval on the base, the post-trained and the merged model, and routing statistics.

Writes ``results.json`` (``{model: {task: {metric, value, ci_low, ci_high, n, chance}}}``),
``activation_stats.json``, ``heatmap.png`` and ``sparsity.png`` (of the merged model), and ``samples/`` with what
each model answered. A killed run keeps the models it had finished.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from components.artifacts import StageContext, StageError, once, parse_config, write_atomically, write_json
from components.evaluation.activations import HeldOutText, measure
from components.evaluation.config import EvaluateConfig, LocalTask
from components.evaluation.figures import draw_heatmap, draw_sparsity
from components.evaluation.lm_eval_tasks import PREFIX, TaskForm, read_index, result_entry, write_tasks
from components.evaluation.sandbox import SandboxError, probe, run_program
from model import SmallThinkerForCausalLM

MODELS: tuple[tuple[str, str, str], ...] = (
    ("base", "pretrain", "stage3"),
    ("posttrain", "posttrain", "model"),
    ("merged", "merge", "model"),
)
"""Name in ``results.json``, parent, and the model's folder there."""
STATISTICS_OF = "merged"


def load_model(folder: Path, config: EvaluateConfig) -> tuple[SmallThinkerForCausalLM, Any]:
    """A checkpoint and its tokenizer, ready to score.

    Raises:
        StageError: the folder does not hold them.
    """
    if not (folder / "config.json").is_file():
        raise StageError(f"{folder} holds no model; run the stage that trains it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = SmallThinkerForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        raise StageError(f"the model in {folder} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise StageError(f"the tokenizer in {folder} has no chat template; evaluation asks through it")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        torch.nn.Module.to(model, "cuda")
    model.train(False)
    return model, tokenizer


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """lm-eval and datasets print and log; results go to files, so only their errors are wanted."""
    names = ("lm_eval", "lm-eval", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def language_model(model: SmallThinkerForCausalLM, tokenizer: Any, config: EvaluateConfig) -> Any:
    """lm-eval's model object, by ``config.backend``."""
    if config.backend == "hf":
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)
    from components.evaluation.language_model import SharedPrefixLM

    return SharedPrefixLM(model, tokenizer, config.batch_size)


def evaluate_tasks(
    lm: Any, folder: Path, forms: Mapping[LocalTask, TaskForm]
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Run local tasks through lm-eval.

    Args:
        lm: an lm-eval model.
        folder: where :func:`write_tasks` put the tasks.
        forms: the tasks to run.

    Returns:
        lm-eval's metrics, and its samples, by task.
    """
    from lm_eval.evaluator import simple_evaluate  # type: ignore[import-untyped]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    metrics: dict[str, dict[str, float]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    with _quiet_libraries():
        from datasets.utils.logging import disable_progress_bar  # type: ignore[import-untyped]

        disable_progress_bar()
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        for chat in (False, True):
            names = [name for name, form in forms.items() if form.chat == chat]
            if not names:
                continue
            outcome = simple_evaluate(
                lm,
                tasks=[PREFIX + name for name in names],
                task_manager=manager,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                bootstrap_iters=0,
            )
            for name in names:
                metrics[name] = dict(outcome["results"][PREFIX + name])
                samples[name] = list(outcome["samples"][PREFIX + name])
    return metrics, samples


def judge_programs(
    samples: Sequence[Mapping[str, Any]], timeout_s: float, progress: bool = True
) -> list[bool]:
    """Run each completed HumanEval program with its tests, confined.

    Raises:
        SandboxError: this machine cannot confine programs.
    """
    verdicts = []
    for sample in tqdm(samples, desc="programs", file=sys.stderr, disable=None if progress else True):
        problem = sample["doc"]
        completion = sample["filtered_resps"][0]
        program = f"{problem['question']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"
        verdicts.append(run_program(program, timeout_s).passed)
    return verdicts


def local_cells(
    forms: Mapping[LocalTask, TaskForm],
    metrics: Mapping[str, Mapping[str, float]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    index: Mapping[str, Any],
    config: EvaluateConfig,
    unsafe: str | None,
) -> dict[str, dict[str, Any]]:
    """Cells of ``results.json`` for the local tasks; ``unsafe`` says why programs cannot be run, if so."""
    cells: dict[str, dict[str, Any]] = {}
    for name, form in forms.items():
        n = len({sample["doc_id"] for sample in samples[name]})
        chance = float(index[form.set_name]["chance"])
        if index[form.set_name]["kind"] == "code":
            if unsafe is None:
                right = sum(judge_programs(samples[name], config.humaneval_timeout_s))
                cells[name] = result_entry("pass@1", right, n, chance)
            continue
        also = {
            key.replace(",none", ""): float(value)
            for key, value in metrics[name].items()
            if "," in key and "stderr" not in key and key != form.metric and isinstance(value, int | float)
        }
        label = form.metric.split(",")[0]
        cells[name] = result_entry(label, metrics[name][form.metric] * n, n, chance, **also)
    return cells


def stock_cells(lm: Any, config: EvaluateConfig, chat: bool) -> dict[str, dict[str, Any]]:
    """Run lm-eval's own tasks, which download their data from a hub.

    Raises:
        StageError: a task does not exist or its data cannot be had.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    cells: dict[str, dict[str, Any]] = {}
    with _quiet_libraries():
        manager = TaskManager()
        for name in config.stock_tasks:
            try:
                outcome = simple_evaluate(
                    lm,
                    tasks=[name],
                    task_manager=manager,
                    limit=config.stock_limit,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    bootstrap_iters=1000,
                    log_samples=False,
                )
            except (KeyError, ValueError, OSError, ImportError) as error:
                raise StageError(
                    f"lm-eval's task {name} cannot be run ({type(error).__name__}: {error}); "
                    "stock tasks need a hub with their data, or drop it from evaluate.stock_tasks"
                ) from error
            for task, values in outcome["results"].items():
                count = outcome.get("n-samples", {}).get(task, {}).get("effective", 0)
                cells |= _stock_task_cells(task, values, int(count))
    return cells


def _stock_task_cells(task: str, values: Mapping[str, Any], n: int) -> dict[str, dict[str, Any]]:
    cells = {}
    for key, value in values.items():
        if "," not in key or "_stderr" in key or not isinstance(value, int | float):
            continue
        metric, _, kind = key.partition(",")
        error = values.get(f"{metric}_stderr,{kind}")
        half = 1.96 * error if isinstance(error, int | float) else None
        cells[task if kind == "none" and metric == "acc" else f"{task}:{metric}:{kind}"] = {
            "metric": metric,
            "value": float(value),
            "ci_low": None if half is None else float(value) - half,
            "ci_high": None if half is None else float(value) + half,
            "n": n,
            "chance": None,
        }
    return cells


def _evaluate_model(
    name: str, folder: Path, context: StageContext, config: EvaluateConfig, forms: dict[LocalTask, TaskForm]
) -> dict[str, Any]:
    """All figures of one model; statistics and pictures too for the one they are kept of."""
    model, tokenizer = load_model(folder, config)
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
