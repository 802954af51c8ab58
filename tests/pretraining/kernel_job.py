"""Run by test_kernels.py in a process of its own: ``python -m tests.pretraining.kernel_job CASES``; prints JSON.

Every case runs a piece of training twice, on the CPU's own path and on the GPU's with its kernels in Triton's
interpreter, forward and backward, and prints the relative error (of norms) of each result and gradient.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from components.pretraining.dry_run.fake_cuda import load_fake_cuda  # noqa: E402

load_fake_cuda()

import contextlib  # noqa: E402
import copy  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from components.pretraining.config import PretrainConfig  # noqa: E402
from components.pretraining.deepspeed.engine import prepare_model  # noqa: E402
from components.pretraining.kernel_proofs.interpreter import interpreted_kernels  # noqa: E402
from components.pretraining.kernel_proofs.targets import TARGETS  # noqa: E402
from components.pretraining.processes.ranks import Ranks  # noqa: E402
from components.pretraining.training.head_loss import fused_token_losses  # noqa: E402
from components.pretraining.training.training_step import training_loss  # noqa: E402
from model import SmallThinkerForCausalLM, preset  # noqa: E402
from model.experts import Experts  # noqa: E402
from model.flex import attend, document_blocks  # noqa: E402
from model.masks import build_layer_mask  # noqa: E402

RAN: Counter[str] = Counter()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype).requires_grad_()


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over norm of what is wanted; what is wanted to be zero must be."""
    assert found.keys() == wanted.keys()
    out = {}
    for name, value in wanted.items():
        off, size = (found[name].double() - value.double()).norm(), value.double().norm()
        out[name] = float(off / size if size else off)
    return out


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    with interpreted_kernels(TARGETS["h100"]) as ran:
        yield
    RAN.update(ran)
    assert ran, "no kernel ran"


def documents(batch: int, tokens: int, count: int) -> Tensor:
    """Rows of ``count`` packed documents; ends of documents are not ends of blocks."""
    generator = torch.Generator().manual_seed(tokens)
    starts_BT = torch.zeros(batch, tokens, dtype=torch.int64)
    for row in starts_BT:
        row[torch.randperm(tokens - 1, generator=generator)[: count - 1] + 1] = 1
    return starts_BT.cumsum(dim=1)


def attention(
    dtype: torch.dtype,
    tokens: int,
    window: int | None,
    packed: int,
    *,
    heads: tuple[int, int] = (2, 1),
    width: int = 32,
    batch: int = 1,
    kernels_window: int | None = None,
) -> dict[str, float]:
    """FlexAttention against a softmax with the trainer's own mask in memory, in float32."""
    count, groups = heads
    shapes = ((batch, n, tokens, width) for n in (count, groups, groups))
    q, k, v = (random(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
    documents_BT, up = documents(batch, tokens, packed), random(batch, count, tokens, width, seed=9)
    mask = build_layer_mask(
        queries=tokens,
        keys=tokens,
        key_offset=0,
        past_tokens=0,
        window=window,
        padding_BS=None,
        documents_BT=documents_BT,
        device=torch.device("cpu"),
    )
    blocks = document_blocks(documents_BT, kernels_window or window)
    plain = [leaf(value, torch.float32) for value in (q, k, v)]
    reference = F.scaled_dot_product_attention(*plain, attn_mask=mask.allowed, enable_gqa=count != groups)
    reference.backward(up.to(dtype).float())
    ours = [leaf(value, dtype) for value in (q, k, v)]
    with kernels():
        out = attend(*ours, blocks)
        out.backward(up.to(dtype))
    return errors(
        {"out": out, **{name: x.grad for name, x in zip("qkv", ours, strict=True)}},  # type: ignore[dict-item]
        {"out": reference, **{name: x.grad for name, x in zip("qkv", plain, strict=True)}},  # type: ignore[dict-item]
    )


def experts(dtype: torch.dtype, tokens: int, top_k: int, chosen: Sequence[int], count: int = 8) -> dict[str, float]:
    """The grouped experts of tokens that choose among ``chosen`` of ``count`` against the loop over experts."""
    config = preset("nano", hidden_size=32, moe_ffn_hidden_size=24, moe_num_primary_experts=count)
    generator = torch.Generator().manual_seed(tokens)
    pool = torch.tensor(list(chosen))
    picked = torch.randint(len(pool), (tokens, top_k), generator=generator)
    experts_TK = pool[picked]
    runs: list[dict[str, Tensor]] = []
    for on_gpu_path in (False, True):
        layer = Experts(config)
        for seed, parameter in enumerate(layer.parameters()):
            value = 0.3 * random(*parameter.shape, seed=seed).to(dtype)
            parameter.data = value if on_gpu_path else value.float()
        working = dtype if on_gpu_path else torch.float32
        m_TD = leaf(random(tokens, 32, seed=5).to(dtype), working)
        weights_TK = leaf(random(tokens, top_k, seed=6).to(dtype), working)
        up_TD = random(tokens, 32, seed=7).to(dtype).to(working)
        with kernels() if on_gpu_path and tokens else contextlib.nullcontext():
            out_TD, active_E = layer(m_TD, weights_TK, experts_TK)
            out_TD.backward(up_TD)
        gradients = {"m": m_TD, "weights": weights_TK, **dict(layer.named_parameters())}
        runs.append(
            {"out": out_TD, "active": active_E}
            | {name: value.grad for name, value in gradients.items() if value.grad is not None}
        )
    return errors(runs[1], runs[0])


def loss(dtype: torch.dtype, tokens: int, vocabulary: int, chunk: int) -> dict[str, float]:
    """The fused loss against torch's cross-entropy of all logits."""
    x, head = random(2, tokens, 32), 0.5 * random(vocabulary, 32, seed=1)
    labels_BT = torch.randint(vocabulary, (2, tokens), generator=torch.Generator().manual_seed(2))
    x, head = x.to(dtype), head.to(dtype)
    plain = [leaf(value, torch.float32) for value in (x, head)]
    logits = (plain[0][:, :-1] @ plain[1].t()).flatten(0, 1)
    F.cross_entropy(logits, labels_BT[:, 1:].flatten()).backward()
    wanted = F.cross_entropy(logits, labels_BT[:, 1:].flatten(), reduction="none")
    ours = [leaf(value, dtype) for value in (x, head)]
    with kernels():
        mean, losses_BT = fused_token_losses(*ours, labels_BT, chunk)
        mean.backward()
    return errors(
        {"losses": losses_BT.flatten(), "x": ours[0].grad, "head": ours[1].grad},  # type: ignore[dict-item]
        {"losses": wanted, "x": plain[0].grad, "head": plain[1].grad},  # type: ignore[dict-item]
    )


def micro_step(dtype: torch.dtype, layers: int, tokens: int, recompute: bool) -> dict[str, float]:
    """Losses and all gradients of a model whose attention and norms are compiled, recomputed or not."""
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
    config = PretrainConfig(activation_checkpointing=recompute, compile_layers=True, loss_chunk_tokens=50)
    ids_BT = torch.randint(211, (2, tokens), generator=torch.Generator().manual_seed(3))
    runs: list[dict[str, Tensor]] = []
    for on_gpu_path in (False, True):
        model = copy.deepcopy(fresh)
        with kernels() if on_gpu_path else contextlib.nullcontext():
            if on_gpu_path:
                prepare_model(model, config, Ranks())
            out = model(
                input_ids=ids_BT,
                document_ids=documents(2, tokens, 4),
                padded=False,
                use_cache=False,
                logits_to_keep=1,
                output_hidden_states=True,
            )
            ce, losses_BT = fused_token_losses(out.hidden_states[-1], model.lm_head.weight, ids_BT, 50)
            training_loss(ce, out, config).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        counts = {"counts": out.router_stats.expert_counts, "active": out.router_stats.active_neurons_by_expert}
        runs.append({"losses": losses_BT, "z": out.router_z_loss, **counts, **gradients})
    return errors(runs[1], runs[0])


FP32, BF16 = torch.float32, torch.bfloat16
CASES: dict[str, Callable[[], dict[str, float]]] = {
    "attention fp32, window, documents, odd length": lambda: attention(FP32, 149, 40, 3),
    "attention bf16, window, documents, odd length": lambda: attention(BF16, 149, 40, 3),
    "attention bf16, a wrong window": lambda: attention(BF16, 149, 40, 3, kernels_window=41),
    "experts fp32, some without rows": lambda: experts(FP32, 37, 2, (1, 4, 6)),
    "experts bf16, some without rows": lambda: experts(BF16, 37, 2, (1, 4, 6)),
    "experts bf16, one with all rows": lambda: experts(BF16, 24, 1, (7,)),
    "experts fp32, no rows at all": lambda: experts(FP32, 0, 2, (0, 1)),
    "loss fp32": lambda: loss(FP32, 21, 199, 16),
    "loss bf16": lambda: loss(BF16, 21, 199, 16),
    "micro-step fp32, recomputed": lambda: micro_step(FP32, 2, 130, recompute=True),
    "micro-step bf16": lambda: micro_step(BF16, 1, 130, recompute=False),
}
# The matrix of the campaign: what the shapes of the full sizes have, in fewer tokens.
for _dtype in (FP32, BF16):
    _name = str(_dtype)[6:]
    for _tokens in (128, 129, 255, 300):
        for _window in (None, 1, 100):
            for _packed in (1, 2, 5):
                if _packed <= _tokens:
                    CASES[f"matrix attention {_name}, {_tokens} tokens, window {_window}, {_packed} documents"] = (
                        lambda d=_dtype, t=_tokens, w=_window, p=_packed: attention(d, t, w, p, batch=2)  # type: ignore[misc]
                    )
    for _heads, _size in (((28, 4), "21b"), ((12, 2), "4b")):
        _per_key = _heads[0] // _heads[1]
        CASES[f"matrix attention {_name}, heads of the {_size}"] = (
            lambda d=_dtype, h=_per_key: attention(d, 261, 200, 3, heads=(h, 1), width=128)  # type: ignore[misc]
        )
    for _tokens in (0, 1, 2, 15, 64, 133):
        for _top_k in (1, 6):
            for _chosen in ((3,), (0, 7), (2, 3, 5), tuple(range(8))):
                CASES[f"matrix experts {_name}, {_tokens} tokens, {_top_k} of {_chosen}"] = (
                    lambda d=_dtype, t=_tokens, k=_top_k, c=_chosen: experts(d, t, k, c)  # type: ignore[misc]
                )
    for _tokens in (2, 3, 50):
        for _vocabulary in (7, 1024, 5003):
            for _chunk in (1, 16, 4096):
                CASES[f"matrix loss {_name}, {_tokens} tokens of {_vocabulary}, chunks of {_chunk}"] = (
                    lambda d=_dtype, t=_tokens, v=_vocabulary, c=_chunk: loss(d, t, v, c)  # type: ignore[misc]
                )
CASES["matrix micro-step fp32, odd length"] = lambda: micro_step(FP32, 2, 151, recompute=False)
CASES["matrix micro-step fp32, recomputed, two blocks"] = lambda: micro_step(FP32, 2, 256, recompute=True)


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
