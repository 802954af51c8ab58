"""The local lm-eval tasks: ``write_tasks(folder, evalsets, ["mmlu"])`` makes files that any lm-eval reads.

Each task becomes ``<name>.yaml`` (written as JSON, which is YAML) beside the questions of its test split, so
``lm_eval --include_path FOLDER --tasks nano_mmlu`` repeats a result with any model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import StageError, write_atomically
from components.corpus.special_tokens import END_OF_TEXT, TURN_END
from components.evaluation.config import EvaluateConfig, LocalTask
from components.measures.intervals import Score
from components.measures.items import rows_of

PREFIX = "nano_"
_PERCENT = {"aggregation": "mean", "higher_is_better": True}
_NUMBER = r"(-?\d+)"


@dataclass(frozen=True)
class TaskForm:
    """How a set is asked.

    Attributes:
        set_name: the evaluation set behind it.
        chat: through the chat template.
        metric: headline metric, as lm-eval names it (``metric,filter``).
        settings: the rest of the task's lm-eval configuration.
    """

    set_name: str
    chat: bool
    metric: str
    settings: dict[str, Any]


def _choices(doc_to_text: str, doc_to_choice: Any, delimiter: str) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": doc_to_text,
        "doc_to_choice": doc_to_choice,
        "doc_to_target": "answer",
        "target_delimiter": delimiter,
        "metric_list": [{"metric": "acc", **_PERCENT}, {"metric": "acc_norm", **_PERCENT}],
    }


def _generation(
    new_tokens: int, until: Sequence[str], filters: Sequence[tuple[str, str, int]], **exact_match: Any
) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": list(until), "do_sample": False, "max_gen_toks": new_tokens},
        "filter_list": [
            {
                "name": name,
                "filter": [
                    {"function": "regex", "regex_pattern": pattern, "group_select": group},
                    {"function": "take_first"},
                ],
            }
            for name, pattern, group in filters
        ],
        "metric_list": [{"metric": "exact_match", **_PERCENT, **exact_match}],
    }


def task_form(name: LocalTask, config: EvaluateConfig) -> TaskForm:
    """The form of a local task.

    Raises:
        StageError: there is no such task.
    """
    end = [TURN_END, END_OF_TEXT]
    letters = ["A", "B", "C", "D"]
    options = "\n".join(f"{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate(letters))
    forms: dict[str, tuple[str, bool, str, dict[str, Any]]] = {
        # Letters, as MMLU is asked; and the full answers' likelihoods, which small models do better at.
        "mmlu": ("mmlu", False, "acc,none", _choices(f"{{{{question}}}}\n{options}\nAnswer:", letters, " ")),
        "mmlu_cloze": (
            "mmlu",
            False,
            "acc_norm,none",
            _choices("Question: {{question}}\nAnswer:", "{{choices}}", " "),
        ),
        "parables_zh": (
            "parables_zh",
            False,
            "acc_norm,none",
            _choices("{{question}}\n寓意：", "{{choices}}", ""),
        ),
        "topic": ("topic", True, "acc,none", _choices("{{question}}", "{{choices}}", "")),
        # Without the chat template, whose tokens a base model has never seen.
        "topic_plain": ("topic", False, "acc,none", _choices("{{question}}\n\nTopic:", "{{choices}}", " ")),
        "topic_generated": (
            "topic",
            True,
            "exact_match,first-line",
            {
                **_generation(16, end, [("first-line", r"^\s*([^\n]+?)\s*(?:\n|$)", 0)]),
                "doc_to_target": "{{choices[answer]}}",
            },
        ),
        "arithmetic": (
            "arithmetic",
            True,
            "exact_match,number",
            _generation(8, end, [("number", _NUMBER, 0)]),
        ),
        "gsm": (
            "gsm",
            True,
            "exact_match,strict",
            _generation(
                config.gsm_max_new_tokens,
                end,
                [("strict", r"####\s*(-?[0-9.,]+)", 0), ("last-number", r"(-?[0-9][0-9.,]*)", -1)],
                regexes_to_ignore=[",", r"\.$"],
            ),
        ),
        # The completions are judged by running them (components.evaluation.sandbox), not by lm-eval.
        "humaneval": (
            "humaneval",
            False,
            "pass@1",
            {
                **_generation(
                    config.humaneval_max_new_tokens, ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], []
                ),
                "filter_list": [{"name": "program", "filter": [{"function": "take_first"}]}],
                "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
            },
        ),
    }
    if name not in forms:
        raise StageError(f"no local task is called {name!r}; there are {', '.join(forms)}")
    set_name, chat, metric, settings = forms[name]
    return TaskForm(set_name, chat, metric, settings)


def read_index(evalsets: Path) -> dict[str, Any]:
    """The index of the evaluation sets.

    Raises:
        StageError: it is missing or not a map of sets.
    """
    path = evalsets / "index.json"
    try:
        index = json.loads(path.read_text())
        if not all(isinstance(entry, dict) and "kind" in entry for entry in index.values()):
            raise ValueError("every set needs a kind")
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing; run the stage evalsets") from error
    except (ValueError, AttributeError) as error:
        raise StageError(f"{path} is not an index of evaluation sets: {error}") from error
    return dict(index)


def write_tasks(
    folder: Path, evalsets: Path, names: Sequence[LocalTask], config: EvaluateConfig
) -> dict[LocalTask, TaskForm]:
    """Write the chosen tasks with the questions of their test split.

    Returns:
        The forms of the tasks written.

    Raises:
        StageError: a set is missing, has no test questions, or has malformed rows.
    """
    index = read_index(evalsets)
    written: dict[LocalTask, TaskForm] = {}
    for name in names:
        form = task_form(name, config)
        if form.set_name not in index:
            raise StageError(
                f"the task {name} needs the set {form.set_name}; this run has {', '.join(sorted(index))}"
            )
        rows = rows_of(evalsets / f"{form.set_name}.jsonl", "test")
        if not rows:
            raise StageError(f"the set {form.set_name} has no questions in its test split")
        multiple_choice = form.settings["output_type"] == "multiple_choice"
        if multiple_choice and not all("choices" in row for row in rows):
            raise StageError(f"the set {form.set_name} is not multiple choice, which the task {name} needs")
        data = folder / f"{name}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[: config.limit])
        write_atomically(data, text.encode())
        settings = {
            "task": f"{PREFIX}{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            **form.settings,
            "metadata": {"version": 1.0},
        }
        write_atomically(folder / f"{name}.yaml", json.dumps(settings, ensure_ascii=False, indent=1).encode())
        written[name] = form
    return written


def result_entry(metric: str, right: float, n: int, chance: float | None, **also: float) -> dict[str, Any]:
    """One cell of ``results.json``: value with its 95 % Wilson interval, number of questions, chance level."""
    score = Score.of(round(right), n)
    return {
        "metric": metric,
        "value": right / n if n else 0.0,
        "ci_low": score.ci_low,
        "ci_high": score.ci_high,
        "n": n,
        "chance": chance,
        **({"also": also} if also else {}),
    }
