"""The pipeline stage ``pretrain``: train in this process or under torchrun, then write tables and pictures."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from components.artifacts import METRICS_NAME, StageContext, StageError, parse_config, write_json
from components.pretraining.config import PretrainConfig
from components.pretraining.data.curriculum import Curriculum

EVALUATION_NOTE = (
    "bits per byte on held-out text; start: before a stage's first step, at its context and RoPE base; bigram: "
    "interpolated modified Kneser-Ney on all training tokens, scored on the same tokens"
)


def run(context: StageContext) -> dict[str, float]:
    """Run or resume the stage.

    Returns:
        Headline metrics: held-out bits per byte after each training stage and of the bigram baseline, tokens, steps.

    Raises:
        StageError: a wrong config, missing shards, a loss that is not finite, or an interruption (resumable).
    """
    config = parse_config(PretrainConfig, context)
    from components.pretraining.launcher import needs_torchrun, train_under_torchrun

    if needs_torchrun(config, os.environ):
        evaluations = train_under_torchrun(context, config)
    else:
        evaluations = train_here(context, config)
    return write_results(context, config, evaluations)


def train_here(context: StageContext, config: PretrainConfig) -> dict[str, Any]:
    """Train as one process of the run: the only one, or the one that torchrun's environment says."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    from components.pretraining.processes.health import CONNECTING_S, check_health
    from components.pretraining.processes.heartbeat import beat
    from components.pretraining.processes.interruption import Interruption
    from components.pretraining.processes.ranks import join_processes
    from components.pretraining.training.trainer import Trainer
    from model.compiling import MOST_KINDS, refused_function

    with Interruption.watching() as interruption:
        beat(0, "the start", config.pause_timeout_s)  # from here on the node may pass signals on
        ranks = join_processes(config)
        if ranks.world > 1:
            beat(0, "the check of devices", max(CONNECTING_S, config.hang_timeout_s))
            check_health(ranks)
            beat(0, "the start", config.pause_timeout_s)
        try:
            return Trainer(context, config, ranks, interruption).train()
        except FailOnRecompileLimitHit as error:
            raise StageError(
                f"{refused_function(error) or 'a function'} was to be compiled for more than {MOST_KINDS} kinds of "
                "input (shape, dtype, with or without gradients), and torch would run it uncompiled from here on: "
                "slower, and attention in memory of context x context. What was saved is kept. Start again with "
                "TORCH_LOGS=recompiles to see what differs each time; if it is attention or a norm, "
                "pretrain.compile_layers=false goes on without compiling these."
            ) from error


def write_results(
    context: StageContext, config: PretrainConfig, evaluations: Mapping[str, Any]
) -> dict[str, float]:
    """Write ``heldout.json``, ``activation_stats.json`` and the pictures from the finished evaluations."""
    from components.pretraining.training.figures import draw_bits_per_byte, draw_loss

    curriculum = Curriculum(config)
    names = [span.name for span in curriculum.spans]
    heldout: dict[str, Any] = {name: evaluations[f"{name}:end"]["bits_per_byte"] for name in names}
    heldout["bigram"] = evaluations["bigram"]["bits_per_byte"]
    heldout["start"] = {name: evaluations[f"{name}:start"]["bits_per_byte"] for name in names}
    heldout["nats_per_token"] = {name: evaluations[f"{name}:end"]["nats_per_token"] for name in names}
    heldout["context"] = {name: evaluations[f"{name}:end"]["context"] for name in names}
    heldout["tokens"] = evaluations[f"{names[-1]}:end"]["tokens"]
    heldout["note"] = EVALUATION_NOTE
    write_json(context.out / "heldout.json", heldout)
    longer = _judge_longer_context(context, config)
    write_json(context.out / "activation_stats.json", evaluations[f"{names[-1]}:end"]["activations"])
    context.close()
    draw_loss(context.out / METRICS_NAME, curriculum, context.out / "loss.png")
    draw_bits_per_byte(heldout, names, context.out / "bits_per_byte.png")
    metrics = {f"heldout_bits_per_byte_{name}": heldout[name]["overall"] for name in names}
    metrics["heldout_bits_per_byte_start"] = heldout["start"][names[0]]["overall"]
    metrics["heldout_bits_per_byte_bigram"] = heldout["bigram"]["overall"]
    metrics["tokens"] = float(curriculum.tokens_before(curriculum.total_steps))
    metrics["steps"] = float(curriculum.total_steps)
    metrics.update(longer)
    _note_regressions(context, names, heldout)
    return metrics


def _judge_longer_context(context: StageContext, config: PretrainConfig) -> dict[str, float]:
    """Write ``long_context.json``: the last training stage's effect on the loss before and beyond the old context."""
    old, new = config.stages[-2].context, config.stages[-1].context
    if new <= old or not config.evaluation.position_documents:
        return {}
    from components.measures.positions import measure

    earlier, last = (
        context.out / f"stage{number}" for number in (len(config.stages) - 1, len(config.stages))
    )
    tokens = context.inputs["tokenize"]
    answer = measure(tokens, earlier, last, (old, new), config.evaluation.position_documents)
    write_json(context.out / "long_context.json", answer)
    if not answer["bands"]:
        context.note(f"No held-out document has {new} tokens: the longer context was not judged by position.")
        return {}
    before, beyond = answer["bands"][-2:]
    if before["change_low"] > 0:
        context.note(f"The last stage raised the loss at positions before {old}.")
    if beyond["change_high"] >= 0:
        context.note(f"The last stage did not clearly lower the loss at positions beyond {old}.")
    return {"position_nats_change_before": before["change"], "position_nats_change_beyond": beyond["change"]}


def _note_regressions(context: StageContext, names: list[str], heldout: Mapping[str, Any]) -> None:
    """Note every training stage that did not lower the held-out loss, and a model that the bigram baseline beats."""
    for earlier, later in itertools.pairwise(names):
        if heldout[later]["overall"] >= heldout[earlier]["overall"]:
            context.note(f"{later} did not lower the held-out bits per byte of {earlier}.")
    if heldout[names[-1]]["overall"] >= heldout["bigram"]["overall"]:
        context.note("The model does not beat the bigram baseline on held-out text.")
