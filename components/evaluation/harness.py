"""Asks a model through lm-eval: ``evaluate_tasks(language_model(model, tokenizer, config), folder, forms)``."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from components.artifacts import StageError
from components.evaluation.config import EvaluateConfig, LocalTask
from components.evaluation.language_model import SharedPrefixLM
from components.evaluation.lm_eval_tasks import PREFIX, TaskForm, result_entry
from components.evaluation.sandbox import run_program
from model import SmallThinkerForCausalLM


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
