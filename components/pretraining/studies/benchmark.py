"""Speed of training: ``python -m components.pretraining.studies.benchmark --preset nano`` (``--preset 4b`` on one GPU).

Measures the trainer's own step on random tokens, with real and with forced balanced routing, beside a plain PyTorch
loop of the same model in the same run, taking turns; then profiles one step by part. Model FLOPs utilisation counts 6
FLOPs per active weight and PaLM's attention term (``model/accounting.py``); recomputation does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.corpus.categories import CATEGORIES
from components.pretraining.config import PretrainConfig
from components.pretraining.data.batches import BatchSource
from components.pretraining.presets import PRESETS, benchmark_config
from components.pretraining.studies.profiling import StepProfile
from components.pretraining.training.step_parts import part
from model.accounting import training_flops_per_token

_EOS = 0
_MEAN_DOCUMENT_TOKENS = 600
_STREAM_TOKENS = 1 << 20


class RandomTokens:
    """Random tokens in documents of random length, for every category the same."""

    def __init__(self, vocabulary: int) -> None:
        generator = np.random.default_rng(0)
        self._tokens = generator.integers(1, vocabulary, _STREAM_TOKENS, dtype=np.uint32)
        self._tokens[generator.random(_STREAM_TOKENS) < 1 / _MEAN_DOCUMENT_TOKENS] = _EOS

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> npt.NDArray[np.uint32]:
        """Tokens ``[start, start + count)``."""
        return self._tokens[start : start + count]


def _balanced(module: Any, inputs: Any, routing: Any) -> Any:
    """A forward hook of routers: token t takes experts t * K, t * K + 1, … modulo E."""
    tokens, experts = routing.logits_TE.shape
    top_k = routing.experts_TK.shape[1]
    first_T1 = torch.arange(tokens, device=routing.logits_TE.device)[:, None] * top_k
    experts_TK = (first_T1 + torch.arange(top_k, device=first_T1.device)) % experts
    chosen_TK = routing.logits_TE.gather(1, experts_TK).float()
    weights_TK = torch.softmax(chosen_TK, dim=-1).to(routing.weights_TK.dtype)
    return type(routing)(routing.logits_TE, weights_TK, experts_TK)


class Ours:
    """The trainer's step."""

    def __init__(self, config: PretrainConfig) -> None:
        from components.pretraining.architecture import model_config
        from components.pretraining.deepspeed.engine import build_engine, enter_training_stage
        from components.pretraining.deepspeed.initial_model import initial_model
        from components.pretraining.processes.ranks import join_processes
        from components.pretraining.training.training_step import TrainingStep

        self.ranks = join_processes(config)
        self.architecture = model_config(config)
        self.source = BatchSource(
            config, dict.fromkeys(CATEGORIES, RandomTokens(self.architecture.vocab_size)), _EOS
        )
        model = initial_model(config, self.architecture, self.ranks)
        self._engine = build_engine(model, config, self.ranks)
        enter_training_stage(self._engine, config, 0, self.ranks.world)
        self._step = TrainingStep(
            self._engine,
            config,
            # Not read ahead: that would compute during the peer's turn.
            lambda step: self.source.rank_groups(step, self.ranks.rank, self.ranks.world),
            self.ranks,
        )

    @property
    def model(self) -> Any:
        """The model within the engine."""
        return self._engine.module

    def run(self, step: int) -> float:
        """One optimizer step; its loss."""
        gradients = self._step.gradients(step)
        with part("optimizer"):
            self._engine.step()
        return gradients.loss


class PlainLoop:
    """The same model in the loop that a PyTorch tutorial shows: autocast, AdamW and clipping, nothing else."""

    def __init__(self, config: PretrainConfig, ours: Ours) -> None:
        from components.pretraining.deepspeed.engine import build_optimizer
        from components.pretraining.deepspeed.initial_model import initial_model
        from components.pretraining.processes.ranks import Ranks

        self._config, self._source, self._ranks = config, ours.source, ours.ranks
        self.model = initial_model(config, ours.architecture, Ranks(device=ours.ranks.device))
        self.model.train()
        self._optimizer = build_optimizer(self.model, config.optimizer)

    def run(self, step: int) -> float:
        """One optimizer step; its loss."""
        device, total = self._ranks.device, 0.0
        (batches,) = self._source.rank_groups(step, 0, 1)
        low = self._ranks.precision == "bf16"
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
                out = self.model(
                    input_ids=batch.input_ids_BT.to(device),
                    labels=batch.labels_BT.to(device),
                    document_ids=batch.document_ids_BT.to(device),
                    use_cache=False,
                )
            (out.loss / len(batches)).backward()
            total += float(out.ce_loss.detach()) / len(batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optimizer.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.model.balance.reset()
        return total


def _timed(run: Callable[[int], float], steps: range, cuda: bool) -> float:
    """Seconds that ``steps`` take."""
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for step in steps:
        run(step)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def measure(config: PretrainConfig, routing: str, rounds: int, steps: int, peer: bool) -> dict[str, Any]:
    """Tokens per second of both loops, taking turns, and where a step's time goes."""
    ours = Ours(config)
    loops: dict[str, Any] = {"ours": ours, **({"plain": PlainLoop(config, ours)} if peer else {})}
    if routing == "balanced":
        from model.experts import Router

        for loop in loops.values():
            for module in loop.model.modules():
                if isinstance(module, Router):
                    module.register_forward_hook(_balanced)
    cuda = ours.ranks.device.type == "cuda"
    tokens = config.stages[0].context * config.stages[0].sequences_per_step
    for loop in loops.values():
        _timed(loop.run, range(2), cuda)  # allocations, kernels chosen and compiled
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in loops if number % 2 else reversed(loops):
            first = 2 + number * steps
            rates[name].append(steps * tokens / _timed(loops[name].run, range(first, first + steps), cuda))
    flops = training_flops_per_token(ours.architecture, config.stages[0].context)
    result: dict[str, Any] = {
        "routing": routing,
        "precision": ours.ranks.precision,
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        **{name: _summary(values) for name, values in rates.items()},
        "model_tflops": statistics.median(rates["ours"]) * flops / 1e12,
    }
    if peer:
        result["ratio"] = _summary([a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)])
    if cuda:
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    with StepProfile(ours.model) as profile:
        ours.run(2 + rounds * steps)
    result["split_s"] = profile.split_s()
    return result


def machine(config: PretrainConfig) -> dict[str, str]:
    """Hardware and versions."""
    if torch.cuda.is_available() and config.device != "cpu":
        hardware = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        hardware = f"{names[0] if names else platform.machine()}, {config.threads} of {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    return {"hardware": hardware, "versions": versions}


def table(results: Sequence[dict[str, Any]], about: dict[str, str], peak_tflops: float) -> str:
    """The measurements as text."""
    lines = [f"{about['hardware']}; {about['versions']}"]
    for result in results:
        lines.append(
            f"{result['routing']} routing, {result['precision']}, {result['tokens_per_step']:,} tokens a step"
        )
        for name in ("ours", "plain"):
            if name in result:
                rate = result[name]
                lines.append(
                    f"  {name:<8}{rate['median']:>12,.0f} tokens/s  ({rate['low']:,.0f} to {rate['high']:,.0f}, "
                    f"n = {rate['n']})"
                )
        if "ratio" in result:
            ratio = result["ratio"]
            lines.append(f"  ratio   {ratio['median']:>12.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        share = f", {result['model_tflops'] / peak_tflops:.1%} of {peak_tflops:g}" if peak_tflops else ""
        lines.append(f"  model FLOPs  {result['model_tflops']:.3g} TFLOP/s{share}")
        if "peak_memory_gib" in result:
            lines.append(f"  peak memory  {result['peak_memory_gib']:.1f} GiB")
        total = sum(result["split_s"].values())
        lines += [
            f"  {name:<22}{seconds * 1e3:>9.1f} ms {seconds / total:>6.1%}"
            for name, seconds in result["split_s"].items()
            if seconds
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: the table on stderr, JSON on stdout."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--dry-run" in given:
        # In a process of its own: what it needs has to be loaded before torch.
        rest = [argument for argument in given if argument != "--dry-run"]
        return subprocess.call([sys.executable, "-m", "components.pretraining.dry_run", *rest])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="nano")
    parser.add_argument("--routing", choices=("real", "balanced", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a turn")
    parser.add_argument("--context", type=int, default=0, help="tokens of a sequence; 0: the recipe's")
    parser.add_argument(
        "--micro-batch", type=int, default=0, help="sequences of a forward pass; 0: the recipe's"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes of a step")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers; 0: the recipe's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the recipe's")
    parser.add_argument(
        "--no-peer", action="store_true", help="without the plain loop (its fp32 weights need room)"
    )
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="dense bf16 peak, for the utilisation")
    parser.add_argument(
        "--dry-run", action="store_true", help="estimate a GPU's step without one; options: dry_run --help"
    )
    options = parser.parse_args(given)
    config = benchmark_config(
        options.preset,
        2 + options.rounds * options.steps + 1,
        options.context,
        options.micro_batch,
        options.accumulation,
        options.layers,
        options.device,
        options.threads,
    )
    about = machine(config)
    kinds = ("real", "balanced") if options.routing == "both" else (options.routing,)
    results = [measure(config, kind, options.rounds, options.steps, not options.no_peer) for kind in kinds]
    sys.stderr.write(table(results, about, options.peak_tflops) + "\n")
    sys.stdout.write(json.dumps({**about, "results": results}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
