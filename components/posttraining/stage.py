"""What stage ``posttrain`` does, in order: ``run(context)``.

Reads pretrain's ``stage3/``, tokenize's ``tokenizer/`` and held-out shards, synthesize's ``sft.jsonl`` and the
development items of evalsets. Scores the base model, fine-tunes, saves, scores again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.artifacts import (
    METRICS_NAME,
    StageContext,
    StageError,
    once,
    parse_config,
    write_atomically,
    write_json,
)
from components.corpus.dialogues import DialogueEncoder, Encoded, read_dialogues
from components.corpus.shards import TOKENIZER_FOLDER, TokenShards
from components.measures.heldout import HeldOut
from components.measures.task_suite import Gain, TaskScore, TaskSuite
from components.posttraining.config import PosttrainConfig
from components.posttraining.dialogue_loss import dialogue_loss, split_dialogues
from components.posttraining.figures import draw
from components.posttraining.packing import PackedRows
from components.posttraining.training import Trainer
from components.weights.devices import choose_device
from components.weights.model_folders import check_vocabulary, load_model, save_model
from model import SmallThinkerForCausalLM

_HELDOUT_PREFIX = "heldout/"


@dataclass
class Judge:
    """Scores a model on everything that is held out."""

    encoder: DialogueEncoder
    dialogues: list[tuple[str, Encoded]]
    suite: TaskSuite
    text: HeldOut
    config: PosttrainConfig

    def score(self, model: SmallThinkerForCausalLM) -> dict[str, Any]:
        """Held-out dialogue loss, bits per byte of text, and the tasks, as JSON values."""
        config = self.config
        device = next(model.parameters()).device
        loss = dialogue_loss(model, self.dialogues, config.context, config.rows_per_micro_batch)
        text = self.text.evaluate(model, config.context, device)
        assert text is not None
        tasks = self.suite.score(model, self.encoder)
        return {
            "sft_loss": loss.to_json(),
            "bits_per_byte": text.bits_per_byte,
            "tasks": {
                name: {"right": list(task.right), "answer_nats": task.answer_nats, "chance": task.chance}
                for name, task in tasks.items()
            },
        }


def run(context: StageContext) -> dict[str, float]:
    """Run the stage; see :func:`components.posttraining.run`."""
    config = parse_config(PosttrainConfig, context)
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    tokenizer_folder = context.inputs["tokenize"] / TOKENIZER_FOLDER
    encoder = DialogueEncoder.open(tokenizer_folder)
    dialogues = read_dialogues(context.inputs["synthesize"] / "sft.jsonl")
    training, held = split_dialogues(dialogues, config.heldout_percent, config.heldout_dialogues)
    if not training or not held:
        raise StageError(
            f"sft.jsonl holds {len(dialogues)} dialogues, {len(training)} to train on and {len(held)} held out; "
            "both need at least one. Synthesize more, or change posttrain.heldout_percent."
        )
    model = load_model(context.inputs["pretrain"] / "stage3", device)
    check_vocabulary(model, encoder)
    rows = PackedRows(
        [encoder.encode(dialogue.messages) for dialogue in training], config.context, config.seed
    )
    if rows.cut or rows.dropped:
        context.note(
            f"{rows.cut} dialogues were cut at {config.context} tokens; {rows.dropped} of them had no answer left."
        )
    judge = Judge(
        encoder,
        [(dialogue.task, encoder.encode(dialogue.messages)) for dialogue in held],
        TaskSuite.open(context.inputs["evalsets"], config.tasks, config.task_items),
        HeldOut.open(
            TokenShards.open(context.inputs["tokenize"]),
            tokenizer_folder / "tokenizer.json",
            config.text_tokens_per_category,
        ),
        config,
    )
    base = once(context.scratch / "base.json", lambda: judge.score(model))

    trainer = Trainer(model, rows, config, context.scratch / "checkpoints")
    for complaint in trainer.resume():
        context.note(complaint)
    context.close()  # the file is about to be replaced
    has_base = trim_metrics(context.out / METRICS_NAME, trainer.progress.step)
    if not has_base:
        context.log_metrics(_flat(base), 0)
    trainer.train(context.log_metrics, _keepers(context, trainer, encoder, tokenizer_folder))
    save_model(model, encoder, tokenizer_folder, context.out / "model", context.scratch)

    after = judge.score(model)
    context.log_metrics(_flat(after), trainer.progress.step)
    heldout = _compare(base, after)
    write_json(context.out / "heldout.json", heldout)
    context.close()
    draw(context.out / "sft.png", context.out / METRICS_NAME, heldout)
    return _headline(heldout, trainer, rows)


def trim_metrics(path: Path, step: int) -> bool:
    """Drop lines of ``metrics.jsonl`` that a run resumed at ``step`` will write again, and a torn last line.

    Returns:
        Whether the base model's line (step 0) is there.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return False
    kept, has_base = [], False
    for line in lines:
        try:
            row = json.loads(line)
            number, names = int(row["step"]), list(row["metrics"])
        except (ValueError, KeyError, TypeError):
            continue  # torn by the crash
        is_heldout = any(name.startswith(_HELDOUT_PREFIX) for name in names)
        if number > step or (is_heldout and number > 0):
            continue
        has_base = has_base or is_heldout
        kept.append(line)
    write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
    return has_base


def _keepers(
    context: StageContext, trainer: Trainer, encoder: DialogueEncoder, tokenizer_folder: Path
) -> dict[int, Callable[[], None]]:
    """Actions that keep the weights at some points of the run, by number of finished steps."""

    def keeper(step: int) -> Callable[[], None]:
        folder = context.out / "checkpoints" / f"step-{step:06d}"
        return lambda: save_model(trainer.model, encoder, tokenizer_folder, folder, context.scratch)

    steps = {round(fraction * trainer.total_steps) for fraction in trainer.config.kept_fractions}
    return {step: keeper(step) for step in steps if 0 < step < trainer.total_steps}


def _task(values: Mapping[str, Any]) -> TaskScore:
    return TaskScore(tuple(values["right"]), values["answer_nats"], values["chance"])


def _compare(base: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``heldout.json``."""
    tasks = {}
    for name in base["tasks"]:
        before, now = _task(base["tasks"][name]), _task(after["tasks"][name])
        tasks[name] = {
            "base": before.to_json(),
            "sft": now.to_json(),
            "gain": Gain.between(before, now).to_json(),
            "split": "dev",
        }
    return {
        "sft_loss": {"base": base["sft_loss"], "sft": after["sft_loss"]},
        "bits_per_byte": {"base": base["bits_per_byte"], "sft": after["bits_per_byte"]},
        "tasks": tasks,
    }


def _flat(scores: Mapping[str, Any]) -> dict[str, float]:
    """One level of metrics for ``metrics.jsonl``."""
    flat = {
        f"{_HELDOUT_PREFIX}sft_loss": scores["sft_loss"]["nats_per_token"],
        f"{_HELDOUT_PREFIX}bits_per_byte": scores["bits_per_byte"]["overall"],
    }
    for name, values in scores["tasks"].items():
        task = _task(values)
        flat[f"{_HELDOUT_PREFIX}{name}"] = task.score.value
        flat[f"{_HELDOUT_PREFIX}{name}_answer_nats"] = task.answer_nats
    return flat


def _headline(heldout: Mapping[str, Any], trainer: Trainer, rows: PackedRows) -> dict[str, float]:
    metrics = {
        "steps": float(trainer.progress.step),
        "rows": float(len(rows)),
        "row_fill": rows.fill,
        "base_sft_loss": heldout["sft_loss"]["base"]["nats_per_token"],
        "sft_loss": heldout["sft_loss"]["sft"]["nats_per_token"],
        "base_bits_per_byte": heldout["bits_per_byte"]["base"]["overall"],
        "bits_per_byte": heldout["bits_per_byte"]["sft"]["overall"],
    }
    for name, task in heldout["tasks"].items():
        metrics[f"base_{name}"] = task["base"]["score"]
        metrics[name] = task["sft"]["score"]
        metrics[f"{name}_gain"] = task["gain"]["value"]
    return metrics
