"""What stage ``merge`` does, in order: ``run(context)``.

Merges every candidate, scores it, keeps its scores and drops its weights; then merges the chosen one once more into
``model/``. A killed run repeats only the candidate it was at.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from components.artifacts import (
    StageContext,
    fsync_path,
    once,
    parse_config,
    write_atomically,
    write_json,
)
from components.corpus.dialogues import DialogueEncoder
from components.corpus.shards import TOKENIZER_FOLDER, TokenShards
from components.measures.heldout import HeldOut
from components.measures.task_suite import TaskSuite
from components.merging.compatibility import check_compatible, read_config
from components.merging.config import MergeConfig
from components.merging.figures import draw
from components.merging.linear import merge
from components.merging.sweep import Scored, checkpoint_folder, choose, utilities
from components.weights.devices import choose_device
from components.weights.model_folders import check_vocabulary, copy_tokenizer, load_model, replace_folder

# Taken from the SFT model whatever the weights: the result is a chat model.
_CHAT_KEYS = ("bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class _Judge:
    """Merges a candidate, scores it and drops its weights."""

    context: StageContext
    config: MergeConfig
    folders: dict[str, Path]
    encoder: DialogueEncoder
    suite: TaskSuite
    text: HeldOut
    device: torch.device

    def score(self, weights: dict[str, float]) -> Scored:
        draft = self.context.scratch / "candidate"
        _merge(weights, self.folders, draft, self.config)
        model = load_model(draft, self.device)
        check_vocabulary(model, self.encoder)
        text = self.text.evaluate(model, self.config.context, self.device)
        assert text is not None
        scored = Scored(weights, self.suite.score(model, self.encoder), text.bits_per_byte)
        del model
        shutil.rmtree(draft)
        return scored


def run(context: StageContext) -> dict[str, float]:
    """Run the stage; see :func:`components.merging.run`."""
    config = parse_config(MergeConfig, context)
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    pretrain, posttrain = context.inputs["pretrain"], context.inputs["posttrain"]
    tokenizer_folder = context.inputs["tokenize"] / TOKENIZER_FOLDER
    names = dict.fromkeys(name for candidate in config.candidates for name in candidate)
    folders = {name: checkpoint_folder(name, pretrain, posttrain) for name in names}
    check_compatible(folders, config.allow_rope_change)
    encoder = DialogueEncoder.open(tokenizer_folder)
    suite = TaskSuite.open(context.inputs["evalsets"], config.tasks, config.task_items)
    text = HeldOut.open(
        TokenShards.open(context.inputs["tokenize"]),
        tokenizer_folder / "tokenizer.json",
        config.text_tokens_per_category,
    )

    judge = _Judge(context, config, folders, encoder, suite, text, device)
    scored: list[Scored] = []
    for number, weights in enumerate(tqdm(config.candidates, desc="merge", unit="candidate")):
        figures = once(
            context.scratch / f"candidate-{number:03d}.json",
            lambda weights=weights: judge.score(weights).to_json(),  # type: ignore[misc]
        )
        scored.append(Scored.from_json(figures))

    chosen = choose(scored, config.bits_per_byte_weight)
    _write_model(scored[chosen].weights, folders, context, config)
    report = _report(scored, chosen, config)
    write_json(context.out / "sweep.json", report)
    draw(context.out / "sweep.png", scored, chosen)
    return _headline(scored, chosen, report)


def _merge(weights: dict[str, float], folders: dict[str, Path], out: Path, config: MergeConfig) -> None:
    shutil.rmtree(out, ignore_errors=True)  # what a killed run left
    merge(
        {name: (folders[name], weight) for name, weight in weights.items()},
        out,
        allow_rope_change=config.allow_rope_change,
        shard_bytes=config.shard_bytes,
    )


def _write_model(
    weights: dict[str, float], folders: dict[str, Path], context: StageContext, config: MergeConfig
) -> None:
    draft = context.scratch / "model"
    _merge(weights, folders, draft, config)
    chat = context.inputs["posttrain"] / "model"
    chat_config, merged_config = read_config(chat), read_config(draft)
    merged_config.update({key: chat_config[key] for key in _CHAT_KEYS if key in chat_config})
    write_atomically(draft / "config.json", (json.dumps(merged_config, indent=2) + "\n").encode())
    if (chat / "generation_config.json").is_file():
        shutil.copyfile(chat / "generation_config.json", draft / "generation_config.json")
    copy_tokenizer(context.inputs["tokenize"] / TOKENIZER_FOLDER, draft)
    for path in draft.iterdir():
        fsync_path(path)
    replace_folder(draft, context.out / "model")


def _report(scored: list[Scored], chosen: int, config: MergeConfig) -> dict[str, Any]:
    """The contents of ``sweep.json``."""
    candidates = []
    for candidate, utility in zip(scored, utilities(scored, config.bits_per_byte_weight), strict=True):
        candidates.append(
            {
                "label": candidate.label,
                "weights": candidate.weights,
                "tasks": {name: task.to_json() for name, task in candidate.tasks.items()},
                "task_score": candidate.task_score,
                "bits_per_byte": candidate.bits_per_byte,
                "utility": utility,
            }
        )
    return {
        "rule": "highest of: mean task score - bits_per_byte_weight * (bits per byte / lowest of the sweep - 1)",
        "bits_per_byte_weight": config.bits_per_byte_weight,
        "split": "dev",
        "candidates": candidates,
        "chosen": chosen,
    }


def _headline(scored: list[Scored], chosen: int, report: dict[str, Any]) -> dict[str, float]:
    best = scored[chosen]
    total = sum(best.weights.values())
    metrics = {
        "candidates": float(len(scored)),
        "utility": report["candidates"][chosen]["utility"],
        "bits_per_byte": best.bits_per_byte["overall"],
        "task_score": best.task_score,
    }
    metrics.update({name: task.score.value for name, task in best.tasks.items()})
    metrics.update({f"weight_{name}": weight / total for name, weight in best.weights.items()})
    return metrics
