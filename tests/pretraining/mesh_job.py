"""What every rank does in the tests of expert parallelism, and the same without DeepSpeed: ``reference(case)``.

``python -m pytest tests/pretraining/test_expert_parallel.py``
"""

from __future__ import annotations

import gc
import os
import resource
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.pretraining.architecture import model_config
from components.pretraining.config import ModelPart, PretrainConfig
from components.pretraining.data.batches import MicroBatch
from components.pretraining.deepspeed.engine import build_engine, load_engine, save_engine
from components.pretraining.deepspeed.initial_model import initial_model
from components.pretraining.deepspeed.master_weights import MasterWeights, export_model
from components.pretraining.deepspeed.parameter_names import official_parameter
from components.pretraining.processes.ranks import Ranks, join_processes
from components.pretraining.training.head_loss import token_losses
from components.pretraining.training.telemetry import Layout, RouterEntropy, StepMeter
from components.weights.optimizer import parameter_groups
from model import LoadBalance, SmallThinkerConfig, SmallThinkerForCausalLM
from model.masks import document_ids
from tests.pretraining.factory import MODEL, run_config

EXPERTS, CONTEXT, MICRO, VOCABULARY, EOS = 8, 16, 1, 96, 0
STEPS, MICRO_STEPS, RANKS = 3, 2, 4
BATCH = MICRO * MICRO_STEPS * RANKS
WIDE = {"hidden_size": 512, "moe_ffn_hidden_size": 1024, "moe_num_primary_experts": 32}


@dataclass(frozen=True)
class Case:
    """One run of three clipped AdamW steps over the same eight sequences a step, whatever the mesh.

    Attributes:
        world, expert_parallel, zero_stage: the mesh.
        checkpointing: recompute layers in the backward pass.
        precision: fp32 or bf16.
        routing: ``even``; ``skewed``: expert 0 gets every token, experts 4 to 7 (half of the ranks) none.
        stop_after: save a checkpoint after this step and go on from it in a new engine; 0: do not.
    """

    world: int = 1
    expert_parallel: int = 1
    zero_stage: int = 1
    checkpointing: bool = False
    precision: str = "fp32"
    routing: str = "even"
    stop_after: int = 0


def config_of(case: Case) -> PretrainConfig:
    model = {**MODEL, "moe_num_primary_experts": EXPERTS, "vocab_size": VOCABULARY}
    stages = [{**stage, "context": CONTEXT, "sequences_per_step": BATCH} for stage in run_config()["stages"]]
    return PretrainConfig.model_validate(
        run_config(
            model={"preset": "nano", "overrides": model},
            stages=stages,
            # AdamW divides by the gradient's size: where that is near eps, rounding noise would become a step.
            optimizer={"peak_lr": 2e-3, "warmup_steps": 4, "clip_norm": 0.1, "eps": 1e-6},
            sequences_per_micro_batch=BATCH // (MICRO_STEPS * case.world),
            expert_parallel=case.expert_parallel,
            zero_stage=case.zero_stage,
            activation_checkpointing=case.checkpointing,
            precision=case.precision,
            load_balance_coef=0.5,
            router_z_coef=0.1,
        )
    )


@torch.no_grad()
def skew(model: SmallThinkerForCausalLM) -> None:
    """A constant in the residual stream that draws every token to expert 0 and pushes it from experts 4 to 7."""
    model.model.embed_tokens.weight[:, 0] = 0.1
    for layer in model.model.layers:
        router = layer.block_sparse_moe.primary_router.weight
        router[:, 0] = 0.0
        router[0, 0], router[4:, 0] = 1.0, -1.0


def sequences(step: int) -> Tensor:
    """``[BATCH, CONTEXT]``: each holds a few documents."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCABULARY, (BATCH, CONTEXT), generator=generator)


def rank_batches(step: int, rank: int, world: int) -> list[MicroBatch]:
    """As ``BatchSource.rank_groups`` deals out rows."""
    rows, size = sequences(step), BATCH // (MICRO_STEPS * world)
    batches = []
    for micro_step in range(MICRO_STEPS):
        first = (micro_step * world + rank) * size
        ids = rows[first : first + size]
        batches.append(MicroBatch(ids, document_ids(ids, EOS), ids, torch.arange(first, first + size) % 3))
    return batches


def layout_of(architecture: SmallThinkerConfig) -> Layout:
    return Layout(
        architecture.num_hidden_layers,
        architecture.moe_num_primary_experts,
        architecture.moe_num_active_primary_experts,
        architecture.moe_ffn_hidden_size,
    )


def loss_of(model: Any, batch: MicroBatch, config: PretrainConfig, meter: StepMeter, entropy: Any) -> Tensor:
    out = model(input_ids=batch.input_ids_BT, document_ids=batch.document_ids_BT, use_cache=False)
    losses_BT = token_losses(out.logits, batch.labels_BT)
    ce = losses_BT.mean()
    meter.add(batch, losses_BT, ce, out, entropy.take())
    balance, z = out.load_balance_loss.sum(), out.router_z_loss.sum()
    loss: Tensor = ce + config.load_balance_coef * balance + config.router_z_coef * z
    return loss


@torch.no_grad()
def padded(model: Any, rank: int, world: int) -> Tensor:
    """``[2, L, E]``: expert counts and active neurons of an evaluation in which every other row has padding."""
    rows = sequences(99)
    documents = document_ids(rows, EOS)
    for row in range(0, BATCH, 2):
        documents[row, CONTEXT - 3 - row :] = -1
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    was_training = model.training
    out = model.eval()(input_ids=rows[mine], document_ids=documents[mine], use_cache=False)
    model.train(was_training)
    assert out.router_stats.tokens == int((documents[mine] >= 0).sum())
    figures = torch.stack([out.router_stats.expert_counts, out.router_stats.active_neurons_by_expert])
    if world > 1:
        torch.distributed.all_reduce(figures)
    return figures


def reference(case: Case) -> dict[str, Any]:
    """One process, plain torch: no DeepSpeed, no engine of ours."""
    config = config_of(replace(case, world=1, expert_parallel=1))
    architecture = model_config(config)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model = initial_model(config, architecture)
    if case.routing == "skewed":
        skew(model)
    model.to(dtype).float()  # what the working dtype rounds away is away
    model.balance = LoadBalance()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.peak_lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
    )
    meter, entropy = (
        StepMeter(layout_of(architecture), Ranks(0, 1, torch.device("cpu"))),
        RouterEntropy(model),
    )
    answer: dict[str, Any] = {"gradients": [], "norms": [], "meters": [], "padded": padded(model, 0, 1)}
    model.train()
    for step in range(STEPS):
        meter.reset()
        optimizer.zero_grad()
        for batch in rank_batches(step, 0, 1):
            (loss_of(model, batch, config, meter, entropy) / MICRO_STEPS).backward()
        meter.add_group(model.balance.counts)
        model.balance.reset()
        answer["gradients"].append({n: p.grad.clone() for n, p in model.named_parameters()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        answer["norms"].append(float(norm))
        answer["meters"].append(meter.pooled().clone())
        optimizer.step()
    answer["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return answer


def _joined(engine: Any, read: Any) -> dict[str, Tensor]:
    """A value of every parameter with the experts of all ranks side by side, on every rank."""
    joined = {}
    for name, parameter in engine.module.named_parameters():
        value = read(parameter).detach().clone()
        official = official_parameter(name)
        if official is None:
            assert not value.any(), f"{name} should stay zero"
            continue
        if official != name:
            layer = engine.module.get_submodule(name.rpartition(".experts.")[0])
            parts = [torch.empty_like(value) for _ in range(layer.ep_size)]
            torch.distributed.all_gather(parts, value.contiguous(), group=layer.ep_group)
            value = torch.cat(parts)
        joined[official] = value
    return joined


def _engine(case: Case, ranks: Ranks) -> tuple[Any, PretrainConfig]:
    config = config_of(case)
    model = initial_model(config, model_config(config), ranks)
    if case.routing == "skewed":
        skew(model)
    return build_engine(model, config, ranks), config


def train(case: Case, scratch: Path) -> dict[str, Any]:
    """One rank's part, with the engine and meter that the trainer uses."""
    from deepspeed.utils import (  # type: ignore[import-untyped]
        safe_get_full_fp32_param,
        safe_get_full_grad,
    )

    ranks = join_processes(config_of(case))
    engine, config = _engine(case, ranks)
    meter = StepMeter(layout_of(engine.module.config), ranks)
    entropy = RouterEntropy(engine.module)
    answer: dict[str, Any] = {"case": asdict(case), "gradients": [], "norms": [], "meters": []}
    answer["padded"] = padded(engine.module, ranks.rank, ranks.world)
    for step in range(STEPS):
        engine.train()
        meter.reset()
        batches = rank_batches(step, ranks.rank, ranks.world)
        for number, batch in enumerate(batches, 1):
            engine.backward(loss_of(engine, batch, config, meter, entropy))
            if number < len(batches):
                engine.step()
        answer["gradients"].append(_joined(engine, safe_get_full_grad))
        meter.add_group(engine.module.balance.counts)
        engine.step()
        engine.module.balance.reset()
        answer["norms"].append(float(engine.get_global_grad_norm()))
        answer["meters"].append(meter.pooled().clone())
        if step + 1 == case.stop_after:
            save_engine(engine, scratch / "saved", {"step": step})
            torch.distributed.barrier()
            engine, config = _engine(case, ranks)
            assert load_engine(engine, scratch / "saved") == {"step": step}
            entropy = RouterEntropy(engine.module)
    answer["parameters"] = _joined(engine, safe_get_full_fp32_param)
    answer["exports"] = {
        dtype: _exported_files(engine, ranks, config, answer["parameters"], scratch / str(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    return answer


def _status_bytes(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def export_memory(case: Case, folder: Path, max_shard_bytes: int) -> None:
    """Export a model of 404 MB (fp32) from two ranks; each writes down what that took."""
    config = config_of(case)
    config = config.model_copy(update={"model": ModelPart(overrides={**config.model.overrides, **WIDE})})
    architecture, ranks = model_config(config), join_processes(config)
    model = initial_model(config, architecture, ranks)
    engine = build_engine(model, config, ranks)
    gc.collect()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    weights = MasterWeights(engine, ranks, ranks.dtype)
    if ranks.is_first:
        export_model(weights, architecture, ranks.dtype, folder / "model", max_shard_bytes)
    else:
        weights.take_part(architecture)
    (folder / f"rank{ranks.rank}").write_text(str(_status_bytes("VmHWM") - before))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _exported_files(
    engine: Any, ranks: Ranks, config: PretrainConfig, parameters: dict[str, Tensor], folder: Path
) -> dict[str, bool]:
    """Export by streaming, and save a whole model of the same weights: by file, whether the bytes are the same."""
    dtype = getattr(torch, folder.name.removeprefix("torch."))
    weights = MasterWeights(engine, ranks, dtype)
    architecture = model_config(config)
    if not ranks.is_first:
        weights.take_part(architecture)
        return {}
    export_model(weights, architecture, dtype, folder / "streamed", max_shard_bytes=20_000)
    whole = SmallThinkerForCausalLM(architecture)
    whole.load_state_dict(
        {name: value.to(dtype) for name, value in parameters.items()}, strict=False, assign=True
    )
    whole.tie_weights()
    whole.save_pretrained(folder / "whole", max_shard_size=20_000)
    names = {path.name for kind in ("streamed", "whole") for path in (folder / kind).iterdir()}
    return {
        name: (folder / "streamed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
        for name in sorted(names)
    }


def build(answer: Path) -> None:
    """Build the model for every place of several meshes, and one large enough to measure; write down what came out."""
    config = config_of(Case())
    architecture = model_config(config)
    built: dict[str, Any] = {"bf16 is fp32 rounded": []}
    for size in (1, 2, 4):
        parts: dict[str, list[Tensor]] = {}
        for rank in range(size):
            place = Ranks(rank + 4 - size, 4, expert_parallel=size)
            model = initial_model(config, architecture, place)
            low = initial_model(config, architecture, replace(place, precision="bf16"))
            assert all(type(p) is torch.nn.Parameter and p.requires_grad for p in model.parameters())
            for (name, parameter), rounded in zip(model.named_parameters(), low.parameters(), strict=True):
                built["bf16 is fp32 rounded"].append(torch.equal(parameter.to(torch.bfloat16), rounded))
                if official_parameter(name) is not None:
                    parts.setdefault(official_parameter(name) or "", []).append(parameter.detach())
        built[f"ep {size}"] = {
            name: torch.cat(tensors) if "experts" in name else tensors[0] for name, tensors in parts.items()
        }
    large = model_config(
        config.model_copy(update={"model": ModelPart(overrides={**config.model.overrides, **WIDE})})
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = initial_model(config, large)
    built["model_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    built["peak_bytes"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    torch.save(built, answer)


def work(cases: list[Case], scratch: Path) -> None:
    """A rank: run the cases one after the other; the first rank writes what came out."""
    answers = [train(case, scratch / str(number)) for number, case in enumerate(cases)]
    if os.environ["RANK"] == "0":
        torch.save(answers, scratch / "answers.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
