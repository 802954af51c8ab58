"""A training step on a GPU that is not there: ``python -m components.pretraining.dry_run --preset 4b``.

Runs the trainer's own micro-step, backward pass and optimizer of one process over fake CUDA tensors, which have a
shape, a dtype and a device and no memory: the branches for CUDA are taken, their operators' checks apply, and whatever
would synchronise the host with the GPU is an error or listed. Says what the step would allocate, and a lower bound of
its time.

What stands in: DeepSpeed's engine (``FakeEngine`` allocates what ``GradientSums`` or ZeRO-2 do; no collectives) and
Inductor (``fused_regions``; graphs are captured as for it). No kernel runs, so nothing is said about values.
Also called by ``python -m components.pretraining.studies.benchmark --dry-run``.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from components.artifacts import StageError
from components.pretraining.presets import PRESETS

if TYPE_CHECKING:
    from components.pretraining.config import PretrainConfig
    from components.pretraining.dry_run.step_ledger import StepLedger

_PARTS = ("attention", "router and dispatch", "expert products", "head and loss", "optimizer", "rest")
_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default reduce bucket


class FakeEngine:
    """Stands for DeepSpeed's engine around ``model`` in bf16: ZeRO-1 with ``GradientSums``, or ZeRO-2.

    What ZeRO-2 allocates is read off version 0.19.8, ``stage_1_and_2.py``.

    Args:
        model: its weights in the working dtype.
        config: the recipe's part.
        processes: that share the optimizer's state; nothing is sent between them.
        ledger: where allocations are labelled.
    """

    def __init__(self, model: Any, config: PretrainConfig, processes: int, ledger: StepLedger) -> None:
        import torch

        from components.weights.optimizer import parameter_groups

        self.module = model
        self._torch, self._config, self._ledger = torch, config, ledger
        self._bf16 = next(model.parameters()).dtype == torch.bfloat16
        self._partitioned = config.zero_stage >= 2
        self._buckets = 2 if processes > 1 else 1  # overlap_comm has a second one
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self._groups = [list(group["params"]) for group in groups]
        self._masters = []
        for group, parameters in zip(groups, self._groups, strict=True):
            size = -(-sum(p.numel() for p in parameters) // processes)
            self._masters.append(torch.nn.Parameter(torch.empty(size, dtype=torch.float32, device="cuda")))
            group["params"] = [self._masters[-1]]
        # Parameters that touch this process's partition (it is the first): their group and first element there.
        self._places: dict[int, tuple[int, int]] = {}
        for number, (parameters, master) in enumerate(zip(self._groups, self._masters, strict=True)):
            start = 0
            for parameter in parameters:
                if start < master.numel():
                    self._places[id(parameter)] = number, start
                start += parameter.numel()
        part = config.optimizer
        self._optimizer = torch.optim.AdamW(groups, lr=part.peak_lr, eps=part.eps, fused=True)
        for master in self._masters:
            self._optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device="cuda"),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        self._sums: dict[
            int, Any
        ] = {}  # by group, over micro-steps, in fp32: ZeRO-1 whole, ZeRO-2 this process's part
        self._bucket: list[Any] = []
        if not self._partitioned:
            for number, parameters in enumerate(self._groups):
                size = sum(parameter.numel() for parameter in parameters)
                self._sums[number] = torch.zeros(size, dtype=torch.float32, device="cuda")
            ledger.label(self._sums.values(), "gradients")
        for number, parameters in enumerate(self._groups):
            start = 0
            for parameter in parameters:
                reduce = self._reduce if self._partitioned else partial(self._add, number, start)
                parameter.register_post_accumulate_grad_hook(reduce)
                start += parameter.numel()
        ledger.label(model.parameters(), "weights")
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        ledger.label([*self._masters, *states], "master weights and moments")

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def train(self) -> None:
        """Training mode."""
        self.module.train()

    def _open_buckets(self) -> None:
        if not self._bucket:
            dtype = self._torch.bfloat16 if self._bf16 else self._torch.float32
            self._bucket = [
                self._torch.empty(_BUCKET_ELEMENTS, dtype=dtype, device="cuda") for _ in range(self._buckets)
            ]
            self._ledger.label(self._bucket, "gradients")

    def _add(self, group: int, start: int, parameter: Any) -> None:
        """A finished gradient is added to the group's sums, as ``GradientSums`` does."""
        gradient, parameter.grad = parameter.grad, None
        with self._torch.no_grad():
            self._sums[group][start : start + gradient.numel()].view_as(gradient).add_(gradient)

    def _reduce(self, parameter: Any) -> None:
        """A finished gradient goes through the bucket; what this process keeps is copied, or added in fp32."""
        gradient, parameter.grad = parameter.grad, None
        if gradient.numel() <= _BUCKET_ELEMENTS:
            self._bucket[0][: gradient.numel()].copy_(gradient.view(-1))
        if id(parameter) not in self._places:
            return
        group, start = self._places[id(parameter)]
        if group not in self._sums:
            self._sums[group] = self._torch.zeros_like(self._masters[group])
            self._ledger.label([self._sums[group]], "gradients")
        place = self._sums[group][start : start + gradient.numel()]
        place.add_(gradient.view(-1)[: place.numel()].to(self._torch.float32))

    def backward(self, loss: Any, scale_wrt_gas: bool = True) -> None:
        """Gradients of one micro-step."""
        self._ledger.phase = "backward"
        if self._partitioned:
            self._open_buckets()
        loss.backward()
        self._ledger.label((p.grad for p in self.module.parameters() if p.grad is not None), "gradients")
        self._ledger.phase = "forward"

    def step(self) -> None:
        """Gradients to fp32, their norm, and by group AdamW on the master weights, and the weights from these."""
        torch, ledger = self._torch, self._ledger
        ledger.phase = "step"
        with torch.no_grad(), ledger.within("optimizer"):
            self._bucket = []
            means = self._sums
            if not self._partitioned:
                means = {
                    number: torch.empty_like(master).div_(1.0) for number, master in enumerate(self._masters)
                }
                ledger.label(means.values(), "gradients")
                for sums in self._sums.values():
                    sums.zero_()
            for gradient in means.values():
                gradient.norm()
            for number, (parameters, master) in enumerate(zip(self._groups, self._masters, strict=True)):
                master.grad = means.pop(number)
                master.grad.mul_(1.0)  # clipping
                self._optimizer.step()
                master.grad = None
                master.to(parameters[0].dtype)  # into the flat weights
        ledger.phase = "forward"


def dry_config(options: argparse.Namespace) -> PretrainConfig:
    """The recipe's part as it is trained, cut down to what is asked; 0 keeps the recipe's value."""
    from components.pretraining.presets import benchmark_config

    config = benchmark_config(
        options.preset, 1, options.context, options.micro_batch, 1, options.layers, "cuda", 1
    )
    stage = 1 if options.processes == 1 else PRESETS[options.preset]().zero_stage
    values = {**config.model_dump(), "precision": "bf16", "zero_stage": stage}
    if options.loss_chunk:
        values["loss_chunk_tokens"] = options.loss_chunk
    if options.no_checkpointing:
        values["activation_checkpointing"] = False
    if options.recompute_every:
        values["recompute_every"] = options.recompute_every
    return type(config).model_validate(values)


def dry_run(
    config: PretrainConfig, processes: int, peak_tflops: float, bandwidth_tbs: float, micro_steps: int = 2
) -> dict[str, Any]:
    """Run ``micro_steps`` micro-steps and an optimizer step over fake tensors; only after ``load_fake_cuda()``.

    Args:
        config: the recipe's part; its first training stage is run, with one process's micro-batch.
        processes: that share the optimizer's state.
        peak_tflops: of the GPU, dense bf16.
        bandwidth_tbs: of its memory in TB/s.
        micro_steps: costs are of the last one; the first compiles.

    Returns:
        The figures, ready for JSON. Bytes, seconds, FLOPs.

    Raises:
        torch._subclasses.fake_tensor.DataDependentOutputException: the step asks for a value on the GPU.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from components.pretraining.architecture import model_config
    from components.pretraining.data.batches import MicroBatch
    from components.pretraining.deepspeed.engine import prepare_model
    from components.pretraining.deepspeed.initial_model import allocate, model_on_meta
    from components.pretraining.dry_run.fused_regions import region_backend
    from components.pretraining.dry_run.step_ledger import StepLedger
    from components.pretraining.processes.ranks import Ranks
    from components.pretraining.training.training_step import TrainingStep
    from model.accounting import training_flops_per_token
    from model.compiling import set_compile_backend

    architecture = model_config(config)
    stage, micro = config.stages[0], config.micro_batch(0)
    ranks = Ranks(device=torch.device("cuda", 0), precision="bf16")
    model = model_on_meta(architecture)
    with FakeTensorMode():
        allocate(model, ranks.device, ranks.dtype)
        with StepLedger(peak_tflops * 1e12, bandwidth_tbs * 1e12) as ledger:
            set_compile_backend(region_backend(ledger), fullgraph=True)
            prepare_model(model, config, ranks)
            ledger.watch(model)
            engine = FakeEngine(model, config, processes, ledger)
            resting = ledger.live_bytes
            batches: Any = None  # they are made here
            step = TrainingStep(engine, config, batches, ranks)
            engine.train()
            for number in range(micro_steps):
                if number == micro_steps - 1:
                    ledger.restart()
                    compiled_before = ledger.graphs
                ids_BT = torch.zeros(micro, stage.context, dtype=torch.int64)
                batch = MicroBatch(ids_BT, ids_BT, ids_BT, torch.zeros(micro, dtype=torch.int64))
                step.micro_step(batch)
            micro_peak = ledger.peak
            engine.step()
    total = ledger.total()
    without_step = total.bound_s - ledger.total("optimizer").bound_s
    tokens = micro * stage.context
    operators = sorted(ledger.costs.items(), key=lambda item: -item[1].bound_s)
    return {
        "preset": config.model.preset,
        "layers": architecture.num_hidden_layers,
        "context": stage.context,
        "micro_batch": micro,
        "processes": processes,
        "zero_stage": config.zero_stage,
        "recomputed_layers": config.recomputed_layers(architecture.num_hidden_layers),
        "loss_chunk_tokens": config.loss_chunk_tokens,
        "peak_tflops": peak_tflops,
        "memory_bandwidth_tbs": bandwidth_tbs,
        "resting_bytes": resting,
        "peak_bytes": ledger.peak.live_bytes,
        "peak_at": ledger.peak.at,
        "peak_by_kind": ledger.peak.by_kind,
        "peak_by_part": ledger.peak.by_part,
        "micro_step_peak_bytes": micro_peak.live_bytes,
        "part_peak_bytes": dict(ledger.part_peaks),
        "parts": {
            part: {
                "flops": cost.flops,
                "moved_bytes": cost.moved_bytes,
                "bound_s": cost.bound_s,
                "kernels": cost.kernels,
            }
            for part in _PARTS
            for cost in (ledger.total(part),)
        },
        "operators": [
            {
                "part": key[0],
                "phase": key[1],
                "operator": key[2],
                "bound_s": cost.bound_s,
                "kernels": cost.kernels,
                "flops": cost.flops,
                "moved_bytes": cost.moved_bytes,
            }
            for key, cost in operators
        ],
        "host_waits": dict(ledger.waits),
        "graphs": ledger.graphs,
        "compiled_again": ledger.graphs - compiled_before,
        "model_flops": training_flops_per_token(architecture, stage.context) * tokens,
        "bound_s": without_step,
        "most_tokens_per_s": tokens / without_step,
    }


def table(result: dict[str, Any], operators: int) -> str:
    """The figures as text."""
    gb = 1e9
    lines = [
        f"{result['preset']}, {result['layers']} layers, context {result['context']}, micro-batch "
        f"{result['micro_batch']}, one of {result['processes']} processes, ZeRO-{result['zero_stage']}, bf16, "
        f"{result['recomputed_layers']} layers recomputed, loss in chunks of {result['loss_chunk_tokens']} tokens",
        "Estimated on fake tensors; nothing was measured.",
        f"peak memory   {result['peak_bytes'] / gb:.1f} GB in {result['peak_at']} (tensors only); micro-steps "
        f"{result['micro_step_peak_bytes'] / gb:.1f} GB; at rest {result['resting_bytes'] / gb:.1f} GB",
    ]
    for title in ("peak_by_kind", "peak_by_part"):
        lines.append(f"  {title.replace('_', ' ')}")
        largest = sorted(result[title].items(), key=lambda item: -item[1])[:8]
        lines += [f"    {name:<36}{size / gb:9.2f} GB" for name, size in largest]
    lines.append(f"{'part':<22}{'peak GB':>9}{'TFLOP':>9}{'GB moved':>10}{'bound ms':>10}{'kernels':>9}")
    for name, part in result["parts"].items():
        peak = result["part_peak_bytes"].get(name, 0) / gb
        lines.append(
            f"{name:<22}{peak:>9.1f}{part['flops'] / 1e12:>9.2f}{part['moved_bytes'] / gb:>10.1f}"
            f"{part['bound_s'] * 1e3:>10.2f}{part['kernels']:>9}"
        )
    lines.append(
        f"a micro-step takes at least {result['bound_s'] * 1e3:.1f} ms at {result['peak_tflops']:g} TFLOP/s and "
        f"{result['memory_bandwidth_tbs']:g} TB/s: at most {result['most_tokens_per_s']:,.0f} tokens/s per GPU"
    )
    for entry in result["operators"][:operators]:
        lines.append(
            f"  {entry['bound_s'] * 1e3:8.2f} ms {entry['kernels']:6} x {entry['operator']:<28}"
            f"{entry['part']}, {entry['phase']}"
        )
    waits = result["host_waits"]
    lines.append(f"host waits for the GPU in a micro-step: {sum(waits.values())}")
    lines += [f"  {count} x {where}" for where, count in waits.items()]
    lines.append(
        f"graphs captured {result['graphs']}, of them in a later micro-step {result['compiled_again']}"
    )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m components.pretraining.dry_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="4b")
    parser.add_argument("--context", type=int, default=0, help="tokens of a sequence; 0: the recipe's")
    parser.add_argument(
        "--micro-batch", type=int, default=0, help="sequences of a forward pass; 0: the recipe's"
    )
    parser.add_argument("--layers", type=int, default=0, help="fewer layers; 0: the recipe's")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the GPU")
    parser.add_argument(
        "--processes", type=int, default=0, help="that share the optimizer; 0: the recipe's GPUs"
    )
    parser.add_argument("--memory-bandwidth-tbs", type=float, default=3.35, help="of the GPU")
    parser.add_argument(
        "--loss-chunk", type=int, default=0, help="tokens of a chunk of the loss; 0: the recipe's"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument(
        "--recompute-every",
        type=int,
        default=0,
        metavar="N",
        help="recompute every n-th layer (0: as the recipe)",
    )
    parser.add_argument("--operators", type=int, default=12, help="how many of the dearest operators to list")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: the table on stderr, JSON on stdout."""
    from components.pretraining.dry_run.fake_cuda import load_fake_cuda

    command = parser()
    options = command.parse_args(arguments)
    if PRESETS[options.preset]().expert_parallel > 1:
        sys.stderr.write("Expert parallelism is left out: all experts on one process, no all-to-all.\n")
    try:
        load_fake_cuda()
    except StageError as error:
        command.error(str(error))
    config = dry_config(options)
    processes = options.processes or max(1, PRESETS[options.preset]().hardware.gpus)
    began = time.perf_counter()
    result = dry_run(config, processes, options.peak_tflops, options.memory_bandwidth_tbs)
    sys.stderr.write(table(result, options.operators) + f"\n({time.perf_counter() - began:.0f} s)\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0
