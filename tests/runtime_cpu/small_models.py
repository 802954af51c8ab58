"""Random models written as GGUF by the `gguf` package, and the specification's forward pass in plain fp64 numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """A model's dimensions; the layouts are optional as in the file."""

    layers: int = 4
    hidden: int = 48
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 10
    experts: int = 5
    used: int = 2
    expert_hidden: int = 40
    vocab: int = 67
    context: int = 512
    window: int = 0
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6
    softmax: bool = True
    tied: bool = False
    rope: tuple[int, ...] | None = None
    windowed: tuple[int, ...] | None = None
    router_lead: int = 0


def random_weights(shape: Shape, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Tensors by GGUF name, [rows, columns] (experts first)."""
    random = np.random.default_rng(seed)

    def normal(*sizes: int, scale: float = 0.3) -> NDArray[np.float32]:
        return (scale * random.standard_normal(sizes)).astype(np.float32)

    d, f, e = shape.hidden, shape.expert_hidden, shape.experts
    query, shared = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {
        "token_embd.weight": normal(shape.vocab, d, scale=1.0),
        "output_norm.weight": 1 + normal(d, scale=0.1),
    }
    if not shape.tied:
        weights["output.weight"] = normal(shape.vocab, d)
    for i in range(shape.layers):
        block = {
            "attn_norm": 1 + normal(d, scale=0.1),
            "ffn_norm": 1 + normal(d, scale=0.1),
            "attn_q": normal(query, d),
            "attn_k": normal(shared, d),
            "attn_v": normal(shared, d),
            "attn_output": normal(d, query),
            "ffn_gate_inp": normal(e, d, scale=1.0),
            "ffn_gate_exps": normal(e, f, d),
            "ffn_up_exps": normal(e, f, d),
            "ffn_down_exps": normal(e, d, f),
        }
        weights |= {f"blk.{i}.{name}.weight": value for name, value in block.items()}
    return weights


def write_model(
    path: Path, shape: Shape, weights: dict[str, NDArray[np.float32]], kind: str = "F32", gating: bool = True
) -> Path:
    """Write ``path`` with every matrix stored as ``kind`` (norms and routers stay F32)."""
    writer = gguf.GGUFWriter(path, "smallthinker-lead" if shape.router_lead else "smallthinker")
    writer.arch = "smallthinker"
    if shape.router_lead:
        writer.add_uint32("smallthinker.router_lead", shape.router_lead)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.expert_hidden)
    writer.add_expert_feed_forward_length(shape.expert_hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.used)
    if gating:
        function = gguf.ExpertGatingFuncType.SOFTMAX if shape.softmax else gguf.ExpertGatingFuncType.SIGMOID
        writer.add_expert_gating_func(function)
    if shape.window:
        writer.add_sliding_window(shape.window)
    for name, layout in (("rope_layout", shape.rope), ("sliding_window_layout", shape.windowed)):
        if layout is not None:
            writer.add_array(f"smallthinker.{name}", list(layout))
    for name, value in weights.items():
        if kind == "F32" or value.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, value)
        else:
            type_id = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(value, type_id), raw_dtype=type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """The file's tensors as the gguf package dequantises them."""
    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


def reference_logits(
    shape: Shape,
    weights: dict[str, NDArray[np.float32]],
    ids: NDArray[np.int32],
    *,
    router_reads: str = "raw",
    window_error: int = 0,
    rope: tuple[int, ...] | None = None,
    windowed: tuple[int, ...] | None = None,
) -> Array:
    """Logits [T, V] in fp64. The keyword arguments make wrong variants."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    periodic = tuple(int(i % 4 != 0) for i in range(shape.layers))
    rope = rope or shape.rope or (periodic if shape.window else (1,) * shape.layers)
    windowed = windowed or shape.windowed or (periodic if shape.window else (0,) * shape.layers)
    count, h = len(ids), shape.head_dim
    position = np.arange(count)
    angles = position[:, None] * shape.rope_theta ** (-2 * np.arange(h // 2) / h)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotate(x: Array) -> Array:
        first, second = x[..., : h // 2], x[..., h // 2 :]
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)

    distance = position[:, None] - position[None, :]
    x = w["token_embd.weight"][ids]
    entering = []
    for i in range(shape.layers):
        entering.append(x)
        block = {name.split(".")[2]: w[name] for name in w if name.startswith(f"blk.{i}.")}
        normed = _norm(x, block["attn_norm"], shape.epsilon)
        q = (normed @ block["attn_q"].T).reshape(count, shape.heads, h)
        k = (normed @ block["attn_k"].T).reshape(count, shape.kv_heads, h)
        v = (normed @ block["attn_v"].T).reshape(count, shape.kv_heads, h)
        if rope[i]:
            q, k = rotate(q), rotate(k)
        groups = shape.heads // shape.kv_heads
        scores = np.einsum("qnh,knh->nqk", q, np.repeat(k, groups, 1)) / np.sqrt(h)
        visible = distance >= 0
        if windowed[i]:
            visible &= distance < shape.window + window_error
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        attention = np.einsum("nqk,knh->qnh", p, np.repeat(v, groups, 1)).reshape(count, -1)
        y = x + attention @ block["attn_output"].T
        m = _norm(y, block["ffn_norm"], shape.epsilon)
        raw = entering[max(0, i - shape.router_lead)]
        logits = {"raw": raw, "normed": normed, "late": y}[router_reads] @ block["ffn_gate_inp"].T
        x = y.copy()
        for t in range(count):
            chosen = np.sort(np.argsort(-logits[t], kind="stable")[: shape.used])
            score = logits[t, chosen]
            score = np.exp(score - score.max()) if shape.softmax else 1 / (1 + np.exp(-score))
            for expert, share in zip(chosen, score / score.sum(), strict=True):
                gate = np.maximum(block["ffn_gate_exps"][expert] @ m[t], 0)
                x[t] += share * (
                    block["ffn_down_exps"][expert] @ (gate * (block["ffn_up_exps"][expert] @ m[t]))
                )
    head = w.get("output.weight", w["token_embd.weight"])
    return _norm(x, w["output_norm.weight"], shape.epsilon) @ head.T


def row_errors(got: NDArray[np.float32], exact: NDArray[np.floating]) -> NDArray[np.float64]:
    """||row - exact|| / ||exact|| of each row."""
    difference = np.linalg.norm(got.astype(np.float64) - exact, axis=-1)
    return np.asarray(difference / np.linalg.norm(exact, axis=-1))
