"""The checks that one GPU settles, each ``check(Sizes) -> Outcome``; started by ``kernel_proofs.on_gpu``.

With ``Sizes.rehearsal()`` the same code runs on the CPU at small sizes, kernels in Triton's interpreter.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from components.pretraining.kernel_proofs.agreement import (
    TOLERANCE,
    AttentionCase,
    attention_errors,
    beyond_tolerance,
    experts_errors,
    loss_errors,
    packed_documents,
    random_values,
    relative_errors,
)
from components.pretraining.kernel_proofs.targets import TARGETS
from components.pretraining.presets import PRESETS
from model import SmallThinkerConfig, SmallThinkerForCausalLM, preset

_BF16 = torch.bfloat16
# Vendors' peaks of memory in TB/s and of dense bf16 products in TFLOP/s, by a word of the device's name.
_PEAKS = {"H100": (3.35, 989.0), "H200": (4.8, 989.0), "B200": (8.0, 2250.0)}


@dataclass
class Outcome:
    """What a check found: why it failed (nothing: it passed), and its figures, ready for JSON."""

    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def compare(self, what: str, errors: dict[str, float], dtype: torch.dtype = _BF16) -> None:
        """Keep errors, and as problems those that roundings do not explain."""
        self.figures[what] = errors
        for name, error in beyond_tolerance(errors, dtype).items():
            self.problems.append(f"{what}: {name} is off by {error:.2e}, of at most {TOLERANCE[dtype]:.1e}")


@contextmanager
def _in_interpreter() -> Iterator[None]:
    from components.pretraining.kernel_proofs.interpreter import interpreted_kernels

    with interpreted_kernels(TARGETS["h100"]):
        yield


@dataclass(frozen=True)
class Sizes:
    """Where and how large the checks run; the defaults are those of a GPU."""

    device: torch.device
    attention: tuple[AttentionCase, ...]
    experts: tuple[SmallThinkerConfig, ...]
    tokens: int
    vocabulary: int
    benchmarks: tuple[tuple[str, int], ...]
    copied_bytes: int
    path: Callable[[], AbstractContextManager[Any]] = nullcontext

    @classmethod
    def gpu(cls) -> Sizes:
        """The recipes' shapes."""
        heads = {"21b": {"heads": 28, "groups": 4}, "4b": {"heads": 12, "groups": 2}}
        attention = []
        for recipe, shape in heads.items():
            architecture = preset(recipe)
            windows = {None} | ({architecture.sliding_window_size} if recipe == "21b" else set())
            for stage in (0, 2):
                context = min(
                    PRESETS[recipe]().stages[stage].context, 16_384
                )  # the reference's scores have to fit
                for window in windows:
                    attention.append(AttentionCase(context, window, 5, head_dim=128, **shape))
        return cls(
            device=torch.device("cuda", 0),
            attention=tuple(attention),
            experts=(preset("21b"), preset("4b")),
            tokens=4096,
            vocabulary=151_936,
            benchmarks=(("21b", 4), ("4b", 8)),
            copied_bytes=1 << 32,
        )

    @classmethod
    def rehearsal(cls) -> Sizes:
        """Small, on the CPU."""
        small = preset("nano", hidden_size=32, moe_ffn_hidden_size=24)
        return cls(
            device=torch.device("cpu"),
            attention=(AttentionCase(130, 40, 2),),
            experts=(small,),
            tokens=24,
            vocabulary=131,
            benchmarks=(("smoke", 2),),
            copied_bytes=1 << 20,
            path=_in_interpreter,
        )

    def seconds(self, function: Callable[[], Any], repeats: int = 10) -> float:
        """Mean time of a call, after one that is not timed."""
        function()
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        self.wait()
        return (time.perf_counter() - began) / repeats

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def check_environment(sizes: Sizes) -> Outcome:
    """What the machine is."""
    outcome = Outcome(figures={"torch": torch.__version__, "cuda": torch.version.cuda})
    if sizes.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        outcome.figures |= {
            "name": properties.name,
            "capability": torch.cuda.get_device_capability(),
            "memory_bytes": properties.total_memory,
        }
    return outcome


def check_empty_groups(sizes: Sizes) -> Outcome:
    """grouped_mm with groups of no rows, forward and backward: pytorch#172439 (B200), pytorch#193633 (2.13)."""
    outcome = Outcome()
    for config in sizes.experts:
        experts, width = config.moe_num_primary_experts, config.hidden_size
        rows = sizes.tokens
        cases = {
            "none": [rows // experts] * experts,
            "first half": [0] * (experts // 2) + [rows // (experts // 2)] * (experts // 2),
            "last half": [rows // (experts // 2)] * (experts // 2) + [0] * (experts // 2),
            "every other": [2 * rows // experts, 0] * (experts // 2),
            "all but one": [0] * (experts - 1) + [rows],
            "odd rows": [0, 1, 3] + [0] * (experts - 4) + [rows - 4],
        }
        for name, counts in cases.items():
            ends_E = torch.tensor(counts, device=sizes.device).cumsum(0).to(torch.int32)
            shapes = ((sum(counts), width), (experts, width, config.moe_ffn_hidden_size))
            values = [
                random_values(*shape, seed=i, device=sizes.device).to(_BF16) for i, shape in enumerate(shapes)
            ]
            x, w = (value.clone().requires_grad_() for value in values)
            out = F.grouped_mm(x, w, offs=ends_E)
            up = random_values(*out.shape, seed=9, device=sizes.device).to(_BF16)
            out.backward(up)
            plain_x, plain_w = (value.float().requires_grad_() for value in values)
            parts = zip(plain_x.split(counts), plain_w, strict=True)
            right = torch.cat([part @ weight for part, weight in parts])
            right.backward(up.float())
            grads: list[Any] = [x.grad, w.grad, plain_x.grad, plain_w.grad]
            outcome.compare(
                f"{config.model_name}, groups without rows: {name}",
                relative_errors(
                    {"out": out, "x": grads[0], "w": grads[1]}, {"out": right, "x": grads[2], "w": grads[3]}
                ),
            )
    return outcome


def check_router_logits(sizes: Sizes) -> Outcome:
    """Router logits in bf16: rounded once, and how many tokens that sends elsewhere than fp32 would."""
    outcome = Outcome()
    for config in sizes.experts:
        experts, width = config.moe_num_primary_experts, config.hidden_size
        x_TD = random_values(sizes.tokens, width, seed=0, device=sizes.device).to(_BF16)
        weight = (config.initializer_range * random_values(experts, width, seed=1, device=sizes.device)).to(
            _BF16
        )
        low, exact = F.linear(x_TD, weight), x_TD.double() @ weight.double().t()
        what = f"{config.model_name}, router"
        outcome.compare(what, relative_errors({"logits": low}, {"logits": exact}))
        top_k = config.moe_num_active_primary_experts
        choices = [logits.topk(top_k, dim=-1).indices.sort(dim=-1).values for logits in (low, exact)]
        changed = (choices[0] != choices[1]).any(dim=-1).double().mean()
        outcome.figures[f"{what}: share of tokens with another expert than in fp64"] = float(changed)
    return outcome


def _layers(config: SmallThinkerConfig, count: int, vocabulary: int) -> SmallThinkerConfig:
    values = {key: value for key, value in config.to_dict().items() if key in config.__dict__}
    for layout in ("rope_layout", "sliding_window_layout"):
        values[layout] = list(values[layout])[:count]
    return SmallThinkerConfig(**{**values, "num_hidden_layers": count, "vocab_size": vocabulary})


def check_recomputed_routing(sizes: Sizes) -> Outcome:
    """Checkpointed layers choose the same experts when they are recomputed, bit for bit, compiled as trained."""
    from components.pretraining.config import PretrainConfig
    from components.pretraining.deepspeed.engine import prepare_model
    from components.pretraining.processes.ranks import Ranks
    from model.experts import Router

    outcome = Outcome()
    for config in sizes.experts:
        with sizes.device:
            model = SmallThinkerForCausalLM(_layers(config, 2, 512)).train()
        model.to(dtype=_BF16)
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

        def keep(module: Any, inputs: Any, routing: Any, seen: Any = seen) -> None:
            seen.setdefault(id(module), []).append(
                (routing.logits_TE.detach().clone(), routing.experts_TK.detach().clone())
            )

        routers = [module for module in model.modules() if isinstance(module, Router)]
        for router in routers:
            router.register_forward_hook(keep)
        tokens = max(sizes.tokens, 130)
        ids_BT = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(0)).to(sizes.device)
        with sizes.path():
            prepare_model(model, PretrainConfig(activation_checkpointing=True, compile_layers=True), Ranks())
            out = model(
                input_ids=ids_BT,
                document_ids=packed_documents(1, tokens, 4, sizes.device),
                padded=False,
                use_cache=False,
            )
            out.logits.float().square().mean().backward()
        for number, router in enumerate(routers):
            passes = seen[id(router)]
            if len(passes) != 2:
                outcome.problems.append(f"layer {number} ran {len(passes)} times, not twice")
                continue
            for what, first, second in zip(("logits", "experts"), *passes, strict=True):
                if not torch.equal(first, second):
                    differ = int((first != second).sum())
                    outcome.problems.append(
                        f"{config.model_name}, layer {number}: {differ} {what} differ when recomputed"
                    )
        outcome.figures[str(config.model_name)] = {"layers": len(routers), "tokens": tokens}
    return outcome


def check_attention(sizes: Sizes) -> Outcome:
    """FlexAttention at training shapes against a softmax in float32, forward and backward."""
    outcome = Outcome()
    for case in sizes.attention:
        began = time.perf_counter()
        errors = attention_errors(case, _BF16, sizes.device, sizes.path)
        outcome.compare(f"{case.tokens} tokens, {case.heads} heads, window {case.window}", errors)
        outcome.figures[f"{case.tokens}/{case.window}: seconds"] = time.perf_counter() - began
    return outcome


def check_experts_and_loss(sizes: Sizes) -> Outcome:
    """The experts' passes and the fused loss at training shapes against float32."""
    outcome = Outcome()
    for config in sizes.experts:
        count = config.moe_num_primary_experts
        for name, chosen in {"all": range(count), "half": range(0, count, 2), "one": [count - 1]}.items():
            errors = experts_errors(config, sizes.tokens, list(chosen), _BF16, sizes.device, sizes.path)
            errors.pop("active")  # a gate next to zero may round to either side
            outcome.compare(f"{config.model_name}, rows for {name} of {count} experts", errors)
        chunk = max(8, sizes.tokens // 4)
        errors = loss_errors(
            sizes.tokens // 2, config.hidden_size, sizes.vocabulary, chunk, _BF16, sizes.device, sizes.path
        )
        outcome.compare(f"{config.model_name}, loss", errors)
    return outcome


def check_copies(sizes: Sizes) -> Outcome:
    """Bytes a second within the GPU and to it, from pinned and from pageable memory."""
    outcome, length = Outcome(), sizes.copied_bytes
    source = torch.arange(length // 8, dtype=torch.int64, device=sizes.device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / sizes.seconds(lambda: target.copy_(source)) / 1e12
    outcome.figures["copied within, TB/s"] = rate
    if not torch.equal(source, target):
        outcome.problems.append("a copy differs from its source")
    host = torch.arange(length // 64, dtype=torch.int64)
    kinds = {"pageable": host}
    if sizes.device.type == "cuda":
        kinds["pinned"] = host.pin_memory()
        word = next((word for word in _PEAKS if word in torch.cuda.get_device_name()), None)
        if word is not None:
            outcome.figures["share of the memory's peak"] = rate / _PEAKS[word][0]
            if rate < 0.7 * _PEAKS[word][0]:
                outcome.problems.append(f"copies reach {rate:.2f} TB/s of {_PEAKS[word][0]}")
    place = torch.empty_like(host, device=sizes.device)
    for name, memory in kinds.items():

        def copy(memory: Tensor = memory) -> None:
            place.copy_(memory, non_blocking=True)

        outcome.figures[f"from {name} memory, GB/s"] = host.nbytes / sizes.seconds(copy) / 1e9
        sizes.wait()
        if not torch.equal(place.cpu(), host):
            outcome.problems.append(f"what was copied from {name} memory differs")
    return outcome


def check_collectives(sizes: Sizes) -> Outcome:
    """NCCL with one rank: the collectives of a run, one of them with nothing to send."""
    backend = "nccl" if sizes.device.type == "cuda" else "gloo"
    store = HashStore()
    if sizes.device.type == "cuda":
        torch.cuda.set_device(sizes.device)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    outcome = Outcome(figures={"backend": backend})
    try:
        values = torch.arange(8.0, device=sizes.device)
        summed, gathered = values.clone(), torch.empty_like(values)
        dist.all_reduce(summed)
        dist.all_gather_into_tensor(gathered, values)
        results = {"all_reduce": summed, "all_gather": gathered}
        for rows in (8, 0):
            received = torch.empty(rows, device=sizes.device)
            dist.all_to_all_single(received, values[:rows].clone(), [rows], [rows])
            results[f"all_to_all of {rows} rows"] = received
        dist.barrier()
        for name, result in results.items():
            if not torch.equal(result, values[: len(result)]):
                outcome.problems.append(f"{name} gives other values")
    finally:
        dist.destroy_process_group()
    return outcome


def _command(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a command of this package prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-1500:]}")
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def check_speed(sizes: Sizes) -> Outcome:
    """Some layers' training step: time, utilisation and peak memory beside the dry run's bound of the same step."""
    outcome = Outcome()
    for recipe, layers in sizes.benchmarks:
        common = ["--preset", recipe, "--layers", str(layers)]
        device = sizes.device.type
        measured = _command(
            "components.pretraining.studies.benchmark",
            *common,
            *("--no-peer", "--routing", "balanced", "--rounds", "3", "--steps", "2", "--device", device),
        )["results"][0]
        peaks = ["--processes", "1"]
        word = next((w for w in _PEAKS if device == "cuda" and w in torch.cuda.get_device_name()), None)
        if word is not None:
            peaks += ["--memory-bandwidth-tbs", str(_PEAKS[word][0]), "--peak-tflops", str(_PEAKS[word][1])]
        planned = _command("components.pretraining.dry_run", *common, *peaks)
        rate = measured["ours"]["median"]
        figures = {
            "tokens/s": measured["ours"],
            "model TFLOP/s": measured["model_tflops"],
            "utilisation": measured["model_tflops"] / planned["peak_tflops"],
            "share of the dry run's bound": rate / planned["most_tokens_per_s"],
            "planned peak bytes": planned["peak_bytes"],
            "split, s": measured["split_s"],
        }
        if device == "cuda":
            peak = measured["peak_memory_gib"] * 2**30
            figures["peak bytes"] = peak
            if peak > 1.1 * planned["peak_bytes"]:
                outcome.problems.append(
                    f"{recipe}: {peak / 1e9:.1f} GB at the peak, planned were {planned['peak_bytes'] / 1e9:.1f}"
                )
            if rate > planned["most_tokens_per_s"]:
                outcome.problems.append(f"{recipe}: faster than the dry run's bound, which is then no bound")
        if not math.isfinite(rate):
            outcome.problems.append(f"{recipe}: no rate was measured")
        outcome.figures[f"{recipe}, {layers} layers"] = figures
    return outcome


CHECKS: dict[str, Callable[[Sizes], Outcome]] = {
    "environment": check_environment,
    "empty-groups": check_empty_groups,
    "recomputed-routing": check_recomputed_routing,
    "attention": check_attention,
    "experts-and-loss": check_experts_and_loss,
    "router-logits": check_router_logits,
    "copies": check_copies,
    "collectives": check_collectives,
    "speed": check_speed,
}
