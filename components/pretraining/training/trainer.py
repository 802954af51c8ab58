"""The training loop: ``Trainer(context, config, ranks).train()`` runs or resumes the three training stages.

Order of events in a training stage: evaluate at its start, train, save at its end, evaluate, export. Saving comes
before evaluating, so that a crash in an evaluation costs no training. All state is (weights, optimizer, step, averages
since the last log line): data order, learning rate and mixture follow from the step.
"""

from __future__ import annotations

import copy
import resource
import shutil
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from components.artifacts import METRICS_NAME, StageContext, StageError, StageInterrupted, fsync_path
from components.corpus.shards import HELD_OUT_SPLIT, TOKENIZER_FOLDER, TRAIN_SPLIT, TokenShards
from components.measures.heldout import HeldOut, fit_bigram
from components.pretraining.architecture import model_config
from components.pretraining.checkpoints.branch import load_branch
from components.pretraining.checkpoints.progress import (
    LOSS_KEY,
    RunRecord,
    align_metrics,
    describe_run,
    evaluation_metrics,
)
from components.pretraining.checkpoints.resharding import load_universal, universal
from components.pretraining.checkpoints.saving import Saver, find_newest
from components.pretraining.config import PretrainConfig
from components.pretraining.data.batches import BatchSource
from components.pretraining.data.curriculum import TrainingStageSpan
from components.pretraining.data.prefetch import Prefetcher
from components.pretraining.deepspeed.engine import build_engine, enter_training_stage, load_engine
from components.pretraining.deepspeed.gradients import averaged_grad_norm, drop_step
from components.pretraining.deepspeed.initial_model import initial_model
from components.pretraining.deepspeed.master_weights import MasterWeights, export_model
from components.pretraining.processes.collectives import Collectives
from components.pretraining.processes.heartbeat import beat
from components.pretraining.processes.interruption import Interruption
from components.pretraining.processes.ranks import Ranks, describe_mesh
from components.pretraining.training.balance_bias import BalanceBias
from components.pretraining.training.dead_experts import DeadExperts
from components.pretraining.training.guard import Limits, LossGuard, SpikeError, stopped
from components.pretraining.training.spike_record import SPIKES_NAME, SpikeRecord
from components.pretraining.training.telemetry import Interval
from components.pretraining.training.training_step import TrainingStep
from components.weights.checkpoint_store import CheckpointStore
from components.weights.model_folders import copy_tokenizer
from model.accounting import training_flops_per_token
from model.compiling import compiled_graphs


class TrainingInterrupted(StageInterrupted):
    """A signal asked the run to stop; it saved a checkpoint, from which the same command resumes."""


class _Rewind(Exception):
    """The run goes back to an earlier checkpoint."""


class Trainer:
    """One process's part in a run.

    Args:
        context: the pipeline stage's context; only the first rank writes through it.
        config: the parsed config.
        ranks: this process's place.
        interruption: set by signals.
    """

    def __init__(
        self, context: StageContext, config: PretrainConfig, ranks: Ranks, interruption: Interruption
    ) -> None:
        self._context, self._config, self._ranks, self._interruption = context, config, ranks, interruption
        limits = Limits(
            config.on_spike,
            config.spike_ratio,
            config.grad_spike_ratio,
            config.max_skips,
            config.max_skips_per_1000,
            config.rewind_steps,
            config.max_rewinds,
        )
        self._collectives = Collectives(ranks)
        self._spikes = SpikeRecord(context.scratch, self._collectives, limits, ranks.is_first)
        self._guard = LossGuard(limits)
        tokens = context.inputs["tokenize"]
        self._tokenizer_folder = tokens / TOKENIZER_FOLDER
        self._shards = TokenShards.open(tokens)
        if TRAIN_SPLIT not in self._shards.splits:
            raise StageError(
                f"The token shards have no split {TRAIN_SPLIT}; there are {', '.join(self._shards.splits)}."
            )
        streams = {
            name: self._shards.shard(TRAIN_SPLIT, name) for name in self._shards.categories(TRAIN_SPLIT)
        }
        self._source = BatchSource(config, streams, self._shards.eos_id)
        self._curriculum = self._source.curriculum
        self._architecture = model_config(config, self._shards)
        self._heldout = HeldOut.open(
            self._shards,
            self._tokenizer_folder / "tokenizer.json",
            config.evaluation.tokens_per_category,
            config.evaluation.sequences_per_batch,
            config.evaluation.sequences_per_batch * config.stages[0].context,
        )
        self._store = CheckpointStore(context.scratch / "checkpoints", config.keep_checkpoints)
        self._record = RunRecord(context.scratch)
        self._metrics_path = context.out / METRICS_NAME
        model = initial_model(config, self._architecture, ranks)
        self._engine = build_engine(model, config, ranks)
        self._batches = Prefetcher(
            lambda step, readers: self._source.rank_groups(step, ranks.rank, ranks.world, readers),
            self._curriculum.total_steps,
            ranks.device,
        )
        self._training = TrainingStep(self._engine, config, self._batches.take, ranks)
        self._interval = Interval(self._training.layout)
        self._dead = DeadExperts(config.dead_expert_share, config.dead_expert_intervals)
        self._bias = BalanceBias(
            config.load_balance_bias_rate, config.load_balance_bias_fade, self._curriculum.total_steps
        )
        self._saver = Saver(self._store, ranks, ranks.mesh(), config.seal_in_background)
        self._step = 0

    # ---------------------------------------------------------------- resuming

    def _first_unfinished_end(self) -> int | None:
        """End of the first training stage without evaluation or export; no later checkpoint may be resumed from."""
        for span in self._curriculum.spans:
            finished = f"{span.name}:end" in self._record and (self._context.out / span.name).is_dir()
            if not finished:
                return span.end
        return None

    def _resume(self) -> None:
        """Load the newest whole checkpoint, if there is one, and drop everything later than it."""
        bounds = [end for end in (self._first_unfinished_end(), self._spikes.return_to) if end is not None]
        checkpoint, complaints = find_newest(
            self._store, min(bounds, default=None), self._ranks, self._collectives
        )
        if checkpoint is None and self._step:
            raise StageError(
                "There is no whole checkpoint left to go back to. The same command starts the run anew and passes over "
                f"the steps that {SPIKES_NAME} names."
            )
        step = checkpoint.step if checkpoint else 0
        if self._ranks.is_first:
            for complaint in complaints:
                self._context.note(complaint)
            self._context.close()  # the metrics file is about to be replaced
            self._store.discard_after(step)
            # A damaged checkpoint may lead back before a training stage's end: its evaluation and export are redone.
            for span in self._curriculum.spans:
                if span.end > step:
                    shutil.rmtree(self._context.out / span.name, ignore_errors=True)
            align_metrics(self._metrics_path, step, self._record)
        self._record.forget_after(step)
        if checkpoint is not None:
            if checkpoint.mesh == self._ranks.mesh():
                state = load_engine(self._engine, checkpoint.path)
            else:
                converted = universal(self._store, checkpoint, self._ranks, self._collectives)
                state = load_universal(self._engine, converted)
                self._note_once(
                    f"Carried the checkpoint of step {step} over from {describe_mesh(checkpoint.mesh)} to "
                    f"{describe_mesh(self._ranks.mesh())}."
                )
            self._step = int(state["step"])
            self._interval.load_state(state["interval"])
            self._guard.load_state(state["guard"])
            self._dead.load_state(state["dead_experts"])
            self._bias.load_state(state["balance_bias"])
            self._note_once(f"Resumed from the checkpoint of step {self._step}.")
        elif self._config.branch is not None:
            begin = load_branch(
                self._engine, self._config.branch, self._store, self._ranks, self._collectives
            )
            self._note_once(
                f"Began with weights and moments of step {begin} of another run: {self._config.branch.checkpoint}."
            )
        self._spikes.returned()
        if checkpoint is None and self._config.on_spike == "rewind":
            self._save()  # what a rewind of the first steps goes back to
        if self._ranks.is_first:
            self._guard.write(self._context.out)
            describe_run(self._context.scratch, dict(self._context.config), self._context.inputs["tokenize"])

    def _save(self) -> None:
        beat(self._step, "the save", max(self._config.save_grace_s, self._config.hang_timeout_s))
        if self._ranks.is_first:
            self._guard.write(self._context.out)
            if self._metrics_path.exists():
                fsync_path(self._metrics_path)  # no checkpoint may be newer than the metrics that lead to it
        state = {
            "step": self._step,
            "interval": self._interval.to_state(),
            "guard": self._guard.to_state(),
            "dead_experts": self._dead.to_state(),
            "balance_bias": self._bias.to_state(),
        }
        self._saver.save(self._engine, self._step, state)

    # ---------------------------------------------------------------- one step

    def _train_step(self, bar: Any) -> float:
        """Gradients and update of the current step; returns seconds spent waiting for data."""
        step, engine = self._step, self._engine
        rate = self._curriculum.learning_rate(step)
        for parameters in engine.optimizer.param_groups:
            parameters["lr"] = rate
        self._bias.apply(engine.module, step)
        gradients, grad_norm = self._training.gradients(step), averaged_grad_norm(engine)
        complaint = self._guard.judge(gradients.loss, grad_norm)
        if complaint is None:
            engine.step()
            self._guard.accept(gradients.loss, grad_norm)
            self._interval.add(gradients.pooled, grad_norm)
            self._bias.update(self._training.layout.expert_counts(gradients.pooled))
        else:
            self._spike(complaint)
        self._step += 1
        bar.update()
        bar.set_postfix(loss=f"{gradients.loss:.3f}", refresh=False)
        return gradients.waited_s

    def _spike(self, complaint: str) -> None:
        """Do about the current step's spike what the config says; the step's gradients are dropped.

        Raises:
            SpikeError: the run stops; it is recorded.
            _Rewind: the run goes back; where to is recorded.
        """
        step, batch = self._step, self._source.sequences(self._step).describe()
        try:
            if self._config.on_spike != "rewind":
                self._guard.refuse(step, complaint, batch)
            elif self._spikes.rewinds >= self._config.max_rewinds:
                raise stopped(step, complaint, batch, f", after {self._spikes.rewinds} rewinds (max_rewinds)")
        except SpikeError:
            self._spikes.stop(step, complaint)
            raise
        drop_step(self._engine)
        if self._config.on_spike == "rewind":
            self._saver.wait()
            oldest = self._collectives.broadcast(self._store.steps()[0] if self._ranks.is_first else 0)
            self._spikes.rewind(step, complaint, batch, oldest)
            raise _Rewind
        self._interval.skip()
        if self._ranks.is_first:
            self._guard.write(self._context.out)

    def _pass_over(self, rewind: dict[str, Any], bar: Any) -> None:
        """Leave the current step's batch out: the spike of ``rewind`` was near it."""
        if self._ranks.is_first and self._step == rewind["first"]:
            tqdm.write(f"Passing over steps {rewind['first']} to {rewind['last']}.", file=sys.stderr)
        reason = f"the run went back from step {rewind['step']}, where {rewind['reason']}"
        self._guard.pass_over(self._step, reason, rewind["batch"])
        self._interval.skip()
        self._step += 1
        bar.update()

    def _is_another_length(self, span: TrainingStageSpan) -> bool:
        """Whether context or RoPE base differ from the training stage before."""
        before = self._curriculum.spans[max(0, span.index - 1)].stage
        return (before.context, before.rope_theta) != (span.stage.context, span.stage.rope_theta)

    def _run_training_stage(self, span: TrainingStageSpan) -> None:
        enter_training_stage(self._engine, self._config, span.index, self._ranks.world)
        if self._step == span.start and self._is_another_length(span):
            self._guard.begin_training_stage()
        flops = training_flops_per_token(self._architecture, span.stage.context)
        config, first = self._config, self._step
        began, waited_s, since = time.perf_counter(), 0.0, self._step
        bar = tqdm(
            total=span.end - span.start,
            initial=self._step - span.start,
            desc=span.name,
            unit="step",
            file=sys.stderr,
            disable=not self._ranks.is_first,
            mininterval=1.0,
        )
        compiled: int | None = None  # graphs after this training stage's first step
        with bar:
            while self._step < span.end:
                # The first step compiles, and makes connections.
                slow = self._step == first
                beat(self._step, "the step", config.pause_timeout_s if slow else config.hang_timeout_s)
                rewind = self._spikes.passed_over(self._step)
                if rewind is None:
                    waited_s += self._train_step(bar)
                    compiled = compiled_graphs() if compiled is None else compiled
                else:
                    self._pass_over(rewind, bar)
                    since += 1  # no work, which the speed must not count
                if self._step % self._config.log_every_steps == 0 or self._step == span.end:
                    elapsed = time.perf_counter() - began
                    tokens = (self._step - since) * span.stage.context * span.stage.sequences_per_step
                    self._log_interval(tokens, elapsed, waited_s, flops)
                    began, waited_s, since = time.perf_counter(), 0.0, self._step
                stop = self._interruption.requested_on_any(self._ranks)
                if stop or self._step == span.end or self._step % self._config.checkpoint_every_steps == 0:
                    self._save()
                if stop:
                    self._stop_now()
        if compiled is not None and (late := compiled_graphs() - compiled):
            self._note_once(
                f"torch compiled {late} graphs after the first step of {span.name}: its shapes change."
            )

    def _stop_now(self) -> None:
        self._saver.wait()
        raise TrainingInterrupted(
            f"Stopped by {self._interruption.name} at step {self._step} of {self._curriculum.total_steps}; everything "
            "up to there is saved, and the same command goes on from it."
        )

    def _log_interval(self, tokens: int, elapsed_s: float, waited_s: float, flops_per_token: float) -> None:
        loads_LE = self._interval.loads()
        metrics = self._interval.drain()
        alarm = None
        if LOSS_KEY in metrics:
            alarm = self._dead.watch(loads_LE, self._step)
            metrics.update(self._dead.metrics(loads_LE))
        if not self._ranks.is_first:
            return
        if alarm is not None:
            tqdm.write(alarm, file=sys.stderr)
        metrics["train/lr"] = self._curriculum.learning_rate(self._step - 1)
        metrics["train/tokens"] = float(self._curriculum.tokens_before(self._step))
        rate = tokens / max(elapsed_s, 1e-9)
        metrics["speed/tokens_per_s"] = rate
        metrics["speed/model_tflops"] = rate * flops_per_token / 1e12
        metrics["speed/data_wait_share"] = waited_s / max(elapsed_s, 1e-9)
        if self._ranks.device.type == "cuda":
            peak = self._config.hardware.peak_tflops * self._ranks.world
            metrics["speed/mfu"] = metrics["speed/model_tflops"] / peak
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            metrics["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._context.log_metrics(metrics, self._step)

    # ---------------------------------------------------------------- evaluation and export

    def _evaluate(self, span: TrainingStageSpan, moment: str) -> None:
        name = f"{span.name}:{moment}"
        if name in self._record:
            return
        beat(self._step, f"the evaluation {name}", self._config.pause_timeout_s)
        enter_training_stage(self._engine, self._config, span.index, self._ranks.world)
        scores = self._heldout.evaluate(
            self._engine.module,
            span.stage.context,
            self._ranks.device,
            # Several ranks must stop at the same point, hence only after the evaluation.
            should_stop=lambda: self._interruption.requested and self._ranks.world == 1,
            rank=self._ranks.rank,
            world=self._ranks.world,
        )
        if self._interruption.requested_on_any(self._ranks) or scores is None:
            self._stop_now()
            return
        self._saver.wait()  # no evaluation is recorded before the checkpoint that it measured is on disk
        if self._ranks.is_first:
            entry = {"step": self._step, "context": span.stage.context, **scores.to_json()}
            self._record.put(name, entry)
            self._context.log_metrics(evaluation_metrics(name, entry), self._step)
        else:
            self._record.values[name] = {"step": self._step}
        self._collectives.barrier()

    def _export(self, span: TrainingStageSpan) -> None:
        """Write the training stage's model as a Hugging Face folder that appears by one rename."""
        target = self._context.out / span.name
        beat(self._step, f"the export {span.name}", self._config.pause_timeout_s)
        if self._collectives.broadcast(target.is_dir()):
            return
        dtype = torch.bfloat16 if self._config.export_dtype == "bf16" else torch.float32
        weights = MasterWeights(self._engine, self._ranks, dtype)
        architecture = copy.deepcopy(self._architecture)
        architecture.rope_theta = span.stage.rope_theta
        if self._ranks.is_first:
            draft = self._context.scratch / f"export-{span.name}"
            shutil.rmtree(draft, ignore_errors=True)
            export_model(weights, architecture, dtype, draft)
            copy_tokenizer(self._tokenizer_folder, draft)
            draft.rename(target)
        else:
            weights.take_part(architecture)
        self._collectives.barrier()

    def _fit_baseline(self) -> None:
        if self._ranks.is_first and "bigram" not in self._record:
            model = fit_bigram(self._shards, self._config.evaluation.bigram_tokens_per_category)
            self._record.put("bigram", self._heldout.bigram(model).to_json())

    def _note_once(self, sentence: str) -> None:
        if self._ranks.is_first:
            self._context.note(sentence)

    # ---------------------------------------------------------------- the run

    def train(self) -> dict[str, Any]:
        """Run what is left to do.

        Returns:
            The finished evaluations by name (complete on the first rank).

        Raises:
            TrainingInterrupted: a signal came; a checkpoint is saved.
            StageError: the loss is non-finite or spiked.
        """
        # 1) Say what a reviewer should know: how it runs, and what the data lack.
        self._note_setting()
        # 2) Resume from the newest whole checkpoint; what is later than it on disk is dropped.
        self._resume()
        # 3) The bigram baseline: counted once, whatever happens to the run.
        self._fit_baseline()
        # 4) The training stages; a rewind resumes from an earlier checkpoint.
        try:
            while True:
                try:
                    self._run_training_stages()
                    break
                except _Rewind:
                    self._resume()
        finally:
            self._batches.close()
            self._saver.settle()
        # 5) What the guard left out and experts that died belong into the manifest.
        for note in (*self._guard.notes(), *self._dead.alarms):
            self._note_once(note)
        return self._record.values

    def _run_training_stages(self) -> None:
        """The training stages in order. One is over when its evaluation and its exported model are on disk."""
        for span in self._curriculum.spans:
            if self._step > span.end or (self._step == span.end and self._is_finished(span)):
                continue
            if self._step == span.start:
                self._evaluate(span, "start")  # at this training stage's context and RoPE base
            self._run_training_stage(span)  # ends with a checkpoint,
            self._evaluate(span, "end")  # so that a crash here costs no training
            self._export(span)
        self._saver.wait()  # the last checkpoint may still be being sealed

    def _note_setting(self) -> None:
        for name, absent in self._source.absent.items():
            self._note_once(f"The shards lack {', '.join(absent)}; {name}'s other shares were scaled up.")
        self._note_once(
            f"Trained in {self._ranks.precision} on {self._ranks.world} x {self._ranks.device.type}."
        )
        missing = [n for n in self._shards.categories(TRAIN_SPLIT) if n not in self._heldout.streams]
        if missing:
            self._note_once(f"Split {HELD_OUT_SPLIT} lacks {', '.join(missing)}: trained on, not measured.")

    def _is_finished(self, span: TrainingStageSpan) -> bool:
        return f"{span.name}:end" in self._record and (self._context.out / span.name).is_dir()
