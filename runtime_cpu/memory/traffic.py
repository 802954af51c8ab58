"""Bytes that computing one token reads from memory: ``weight_bytes(model, sparsity=0.62) + kv_bytes(model, 2048)``.

Decoding on few cores is bound by them; :mod:`runtime_cpu.inspect` foretells them and :mod:`runtime_cpu.bench` divides
its speeds by what the memory gives.
"""

from __future__ import annotations

from runtime_cpu import _core


def weight_bytes(model: _core.Model, sparsity: float = 0.0, head_share: float | None = None) -> int:
    """Bytes of weights that computing one token reads.

    Args:
        sparsity: share of the chosen experts' neurons whose gate is not above zero, where the engine leaves out their
            rows of up and columns of down (:func:`skips_silent_neurons`). 0 reads the chosen experts whole.
        head_share: share of the head's rows that its predictor names; ``None`` reads the head and no predictor.
    """
    total = 0.0
    for name, _kind, _shape, _offset, size in model.tensors():
        if name.startswith("token_embd.") and not model.tied_embeddings:
            total += size // model.vocab_size
        elif name.startswith(("token_embd.", "output.")):
            total += size if head_share is None else head_share * size
        elif name.startswith("head_predictor."):
            total += 0 if head_share is None else size
        elif name == "experts.checksums":
            continue  # read with the file, not with a token
        elif "_exps." in name or ".ffn_experts." in name:
            chosen = size * model.experts_per_token // model.experts
            if ".ffn_gate_exps." in name:
                skipped = 0.0
            elif ".ffn_up_exps." in name or ".ffn_down_exps." in name:
                skipped = sparsity
            else:  # the packed layout: gate, up and down in one tensor
                skipped = sparsity * 2 / 3
            total += chosen - skipped * chosen
        else:
            total += size
    return round(total)


def kv_bytes(model: _core.Model, length: int, kv_type: str = "auto") -> int:
    """Bytes of keys and values that a token reads with ``length`` tokens before it.

    Args:
        kv_type: as :meth:`Engine.open` takes it.
    """
    positions = sum(
        min(length, model.window) if windowed else length for windowed in model.sliding_window_layout
    )
    plan = _core.plan(model, threads=1, context=1, chunk_tokens=1, kv_type=kv_type)
    return 2 * positions * model.kv_heads * plan.kv_vector_bytes


def skips_silent_neurons(model: _core.Model, kernels: str = "auto") -> bool:
    """Whether these kernels leave out the weights of silent neurons: of Q4_0 experts, where they can."""
    return _core.plan(model, threads=1, context=1, chunk_tokens=1, kernels=kernels).expert_bytes > 0
