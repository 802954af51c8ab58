"""Run by test_kernels.py in a process of its own: ``python -m tests.pretraining.kernel_job CASES``; prints JSON.

Every case compares a piece of training on the GPU's path, its kernels in Triton's interpreter, with a plain reference
on the CPU, forward and backward, and prints the relative error of each result and gradient.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from components.pretraining.dry_run.fake_cuda import load_fake_cuda

load_fake_cuda()

import contextlib  # noqa: E402
import copy  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from contextlib import AbstractContextManager  # noqa: E402
from functools import partial  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from components.pretraining.config import PretrainConfig  # noqa: E402
from components.pretraining.deepspeed.engine import prepare_model  # noqa: E402
from components.pretraining.kernel_proofs.agreement import (  # noqa: E402
    AttentionCase,
    attention_errors,
    experts_errors,
    loss_errors,
    packed_documents,
    relative_errors,
)
from components.pretraining.kernel_proofs.interpreter import interpreted_kernels  # noqa: E402
from components.pretraining.kernel_proofs.targets import TARGETS  # noqa: E402
from components.pretraining.processes.ranks import Ranks  # noqa: E402
from components.pretraining.training.training_step import training_loss  # noqa: E402
from model import SmallThinkerForCausalLM, preset  # noqa: E402

RAN: Counter[str] = Counter()
CPU = torch.device("cpu")


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    with interpreted_kernels(TARGETS["h100"]) as ran:
        yield
    RAN.update(ran)
    assert ran, "no kernel ran"


def attention(dtype: torch.dtype, kernels_window: int | None = None, **case: int | None) -> dict[str, float]:
    return attention_errors(AttentionCase(**case), dtype, CPU, kernels, kernels_window)  # type: ignore[arg-type]


def experts(dtype: torch.dtype, tokens: int, top_k: int, chosen: Sequence[int]) -> dict[str, float]:
    config = preset(
        "nano",
        hidden_size=32,
        moe_ffn_hidden_size=24,
        moe_num_primary_experts=8,
        moe_num_active_primary_experts=top_k,
    )
    return experts_errors(config, tokens, chosen, dtype, CPU, kernels)


def loss(dtype: torch.dtype, rows: int, vocabulary: int, chunk: int) -> dict[str, float]:
    return loss_errors(rows, 32, vocabulary, chunk, dtype, CPU, kernels)


def micro_step(dtype: torch.dtype, layers: int, tokens: int, recompute: bool) -> dict[str, float]:
    """All gradients of a model whose attention and norms are compiled, recomputed or not.

    In bf16 every path rounds in its own places, and gates next to zero fall to either side, each of which moves a
    gradient: there it is by how much the GPU's path is further from float32 than 1.5 times the CPU's own. The
    loss has cases of its own and is torch's here.
    """
    kinds = [0, 1][-layers:]  # the last layer has RoPE and a window, the one before neither
    architecture = preset(
        "nano",
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        moe_num_primary_experts=4,
        moe_ffn_hidden_size=40,
        rope_layout=kinds,
        sliding_window_layout=kinds,
        sliding_window_size=21,
        vocab_size=211,
    )
    torch.manual_seed(0)
    fresh = SmallThinkerForCausalLM(architecture).to(dtype).train()
    config = PretrainConfig(activation_checkpointing=recompute, compile_layers=True)
    ids_BT = torch.randint(211, (1, tokens), generator=torch.Generator().manual_seed(3))

    def gradients(working: torch.dtype, path: AbstractContextManager[None] | None) -> dict[str, Tensor]:
        model = copy.deepcopy(fresh).to(working)
        with path or contextlib.nullcontext():
            if path:
                prepare_model(model, config, Ranks())
            out = model(
                input_ids=ids_BT,
                document_ids=packed_documents(1, tokens, 4, CPU),
                padded=False,
                use_cache=False,
            )
            losses_T = F.cross_entropy(out.logits[0, :-1].float(), ids_BT[0, 1:], reduction="none")
            training_loss(losses_T.mean(), out, config).backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"losses": losses_T, "counts": out.router_stats.expert_counts, **named}

    exact, plain, ours = gradients(FP32, None), gradients(dtype, None), gradients(dtype, kernels())
    if dtype == FP32:
        return relative_errors(ours, exact)
    theirs = relative_errors(plain, exact)
    return {
        name: max(0.0, error - 1.5 * theirs[name]) for name, error in relative_errors(ours, exact).items()
    }


FP32, BF16 = torch.float32, torch.bfloat16
CASES: dict[str, Callable[[], dict[str, float]]] = {
    "attention fp32": lambda: attention(FP32, tokens=149, window=40, documents=3),
    "attention bf16": lambda: attention(BF16, tokens=149, window=40, documents=3, batch=2),
    "attention bf16, wrong window": lambda: attention(
        BF16, kernels_window=41, tokens=149, window=40, documents=3
    ),
    "experts fp32, some without rows": lambda: experts(FP32, 37, 2, (1, 4, 6)),
    "experts bf16, some without rows": lambda: experts(BF16, 37, 2, (1, 4, 6)),
    "experts bf16, one with all rows": lambda: experts(BF16, 24, 1, (7,)),
    "experts fp32, no rows at all": lambda: experts(FP32, 0, 2, (0, 1)),
    "loss fp32": lambda: loss(FP32, 9, 131, 12),
    "loss bf16": lambda: loss(BF16, 9, 131, 12),
    "micro-step bf16": lambda: micro_step(BF16, 1, 130, recompute=True),
}


def _matrix() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Documents x windows x odd lengths, rows x experts, chunks of the loss, in both dtypes."""
    for dtype in (FP32, BF16):
        name = str(dtype).removeprefix("torch.")
        for tokens in (128, 129, 255, 300):
            for window in (None, 1, 100):
                for count in (1, 2, 5):
                    what = f"attention {name}, {tokens} tokens, window {window}, {count} documents"
                    case = {"tokens": tokens, "window": window, "documents": count, "batch": 2}
                    yield what, partial(attention, dtype, **case)
        for size, heads in (("21b", 7), ("4b", 6)):
            case = {"tokens": 261, "window": 200, "documents": 3, "heads": heads, "head_dim": 128}
            yield f"attention {name}, heads of the {size}", partial(attention, dtype, **case)
        for tokens in (0, 1, 2, 15, 64, 133):
            for top_k in (1, 6):
                for chosen in ((3,), (0, 7), (2, 3, 5), tuple(range(8))):
                    what = f"experts {name}, {tokens} tokens, {top_k} of {chosen}"
                    yield what, partial(experts, dtype, tokens, top_k, chosen)
        for rows in (2, 3, 50):
            for vocabulary in (7, 1024, 5003):
                for chunk in (1, 16, 4096):
                    what = f"loss {name}, {rows} tokens of {vocabulary}, chunks of {chunk}"
                    yield what, partial(loss, dtype, rows, vocabulary, chunk)
    for recompute in (False, True):
        yield f"micro-step fp32, recomputed: {recompute}", partial(micro_step, FP32, 2, 151, recompute)


CASES |= {f"matrix {what}": case for what, case in _matrix()}


def main(names: Sequence[str]) -> None:
    """Run the named cases: ``default``, ``matrix``, or a name."""
    torch.set_num_threads(1)
    chosen = [
        name
        for name in CASES
        if name in names or ("matrix" if name.startswith("matrix ") else "default") in names
    ]
    found = {}
    for name in chosen:
        found[name] = CASES[name]()
        print(name, file=sys.stderr, flush=True)
    print(json.dumps({"errors": found, "kernels": dict(RAN)}))


if __name__ == "__main__":
    main(sys.argv[1:])
