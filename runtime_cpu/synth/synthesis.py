"""Random models of the real sizes that behave like trained ones: ``write(path, SHAPES["4b"])``.

For measuring speed where the released weights cannot be had. The file is stock llama.cpp (Q4_0 everywhere but norms
and router, as ``llama-quantize --pure`` writes it) and any SmallThinker engine runs it. What decides the speed of a
sparse model is set as the paper (arXiv 2507.20984, section 5) and route traces report it: the share of ReLU neurons
at zero, the popularity of experts, and how many experts consecutive tokens share.

How weights alone do it. The residual stream's dimensions are four ranges of whole blocks of 32:

- ``C`` constant: 1 in every token's embedding, written by no layer (rows of zeros). Router rows and gate rows read it
  as their biases: popular experts, neurons that rest.
- ``G`` group: equal for the ids of a group (``routing.group_size`` neighbours). Routers read it, so tokens of one group
  tend to the same experts; the head favours the current group, so generated text stays in it for a while.
- ``T`` token: random, written by no layer. Routers read it: what tells the tokens of a group apart.
- ``O`` output: almost nothing in the embedding; attention and experts write only here, each layer adding the fraction
  ``_GROWTH`` of what is there, so the stream grows with depth as in trained models. The routers read it a little: the
  part of a routing decision that cannot be known a layer earlier. The head reads it: the next token hangs on the
  whole context, so greedy decoding does not run in circles.

Independent tokens (uniform ids) then share experts by popularity alone; ``routing.text_like_ids`` stays in a group and
shares ``overlap`` of them. All Q4_0 bytes are drawn directly; nothing is quantised, and one chunk is in memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from runtime_cpu.files.gguf_writer import GGUFWriter, TensorInfo, Value
from runtime_cpu.synth.routing import ROUTER_SCALE, TEXT_OVERLAP, UNFORESEEN, group_size, simulate_routing
from runtime_cpu.synth.shapes import Shape, SynthError
from runtime_cpu.synth.vocabulary import synthetic_vocabulary

Bytes = NDArray[np.uint8]

_BLOCK, _BLOCK_BYTES = 32, 18
# Sixteen equally likely weights, near those of a quantised Gaussian, with mean 0.
_LEVELS = np.array([-8, -6, -4, -3, -2, -1, -1, 0, 0, 1, 2, 2, 3, 4, 6, 7])
_LEVEL_STD = float(np.sqrt(np.mean(_LEVELS**2)))
_PAIRS = bytes(int((_LEVELS[i // 16] + 8) << 4 | (_LEVELS[i % 16] + 8)) for i in range(256))
_CONSTANT_BYTE = 0xFF  # two weights of 7 scales
_NORMAL = NormalDist()

_GROWTH = 0.12  # variance that a layer adds to O, relative to what is there
_FIRST_WRITE = 0.25  # what the first layer writes
_ATTENTION_SHARE = 0.2  # of what a layer writes, when it attends to a single token
_SCORE_STD = 2.5  # attention looks at a few keys, not at the mean of all
_EMBEDDING_OUTPUT_STD = 0.02
_BIAS_SPREAD = 0.5  # neurons of an expert differ in how often they are active
_EARLY_SPARSITY, _SPARSITY = (0.95, 0.92), 0.62  # the first two layers; the others
_LOGIT_STD, _GROUP_BOOST = 2.5, 2.2  # of the head; the boost of the current group counts in these deviations
_FILE_TYPE_Q4_0, _SOFTMAX, _SIGMOID = 2, 1, 2


def target_sparsity(layer: int) -> float:
    """Share of a layer's neurons that are to be zero: 0.64 on average over 32 layers."""
    return _EARLY_SPARSITY[layer] if layer < len(_EARLY_SPARSITY) else _SPARSITY


class Synthesis:
    """The tensors of one random model, as Q4_0 bytes; every tensor has a random stream of its own."""

    def __init__(
        self, shape: Shape, seed: int = 0, overlap: float = TEXT_OVERLAP, head_share: float | None = None
    ) -> None:
        """Plan the model.

        Raises:
            SynthError: a size is no multiple of 32, or ``overlap`` or ``head_share`` cannot be had.
        """
        if head_share is not None and not 0 < head_share < 1:
            raise SynthError(f"--head-predictor is {head_share}; allowed is more than 0 and less than 1")
        self.head_share = head_share
        for name, size in (
            ("hidden", shape.hidden),
            ("expert_hidden", shape.expert_hidden),
            ("heads * head_dim", shape.heads * shape.head_dim),
        ):
            if size % _BLOCK or (size < 4 * _BLOCK and name == "hidden"):
                raise SynthError(
                    f"{name} is {size}; blocks of {_BLOCK} have to divide it (hidden: at least 4)"
                )
        self.shape, self.seed, self.overlap = shape, seed, overlap
        self.routing = simulate_routing(shape, overlap)
        blocks = shape.hidden // _BLOCK
        self._blocks = blocks
        self._g_begin, self._t_begin = 1, 1 + (2 if blocks >= 16 else 1)
        self._o_begin = blocks - blocks // 2
        self._o_dims = (blocks - self._o_begin) * _BLOCK
        self._g_dims = (self._t_begin - self._g_begin) * _BLOCK
        self._fixed_energy = (self._o_begin - 1) * _BLOCK  # of G and T; C adds one block
        # Variance of O at the input of every layer and at the end.
        self._o_variance = [_EMBEDDING_OUTPUT_STD**2]
        for layer in range(shape.layers):
            self._o_variance.append(self._o_variance[-1] + self._write_variance(layer))

    def tensors(self) -> list[TensorInfo]:
        """Every tensor in file order."""
        s = self.shape
        infos = [TensorInfo("token_embd.weight", "Q4_0", (s.hidden, s.vocab))]
        for i in range(s.layers):
            for name, kind, shape in (
                ("attn_norm", "F32", (s.hidden,)),
                ("attn_q", "Q4_0", (s.hidden, s.heads * s.head_dim)),
                ("attn_k", "Q4_0", (s.hidden, s.kv_heads * s.head_dim)),
                ("attn_v", "Q4_0", (s.hidden, s.kv_heads * s.head_dim)),
                ("attn_output", "Q4_0", (s.heads * s.head_dim, s.hidden)),
                ("ffn_norm", "F32", (s.hidden,)),
                ("ffn_gate_inp", "F32", (s.hidden, s.experts)),
                ("ffn_gate_exps", "Q4_0", (s.hidden, s.expert_hidden, s.experts)),
                ("ffn_up_exps", "Q4_0", (s.hidden, s.expert_hidden, s.experts)),
                ("ffn_down_exps", "Q4_0", (s.expert_hidden, s.hidden, s.experts)),
            ):
                infos.append(TensorInfo(f"blk.{i}.{name}.weight", kind, shape))
        infos.append(TensorInfo("output_norm.weight", "F32", (s.hidden,)))
        if not s.tied:
            infos.append(TensorInfo("output.weight", "Q4_0", (s.hidden, s.vocab)))
        if self.head_share is not None:
            infos.append(TensorInfo("head_predictor.down.weight", "Q4_0", (s.hidden, self._predictor_width)))
            infos.append(TensorInfo("head_predictor.up.weight", "Q4_0", (self._predictor_width, s.vocab)))
        return infos

    def metadata(self) -> dict[str, Value]:
        """Keys of the file: llama.cpp's, the expert statistics, and how the weights were made."""
        s, prefix = self.shape, "smallthinker"
        frequency = [self.routing.frequency_E[self._rank_of_expert(layer)] for layer in range(s.layers)]
        values: dict[str, Value] = {
            "general.architecture": prefix,
            "general.name": f"{s.name} (random weights)",
            "general.file_type": _FILE_TYPE_Q4_0,
            "general.quantization_version": 2,
            f"{prefix}.block_count": s.layers,
            f"{prefix}.context_length": s.context,
            f"{prefix}.embedding_length": s.hidden,
            f"{prefix}.feed_forward_length": s.expert_hidden,
            f"{prefix}.expert_feed_forward_length": s.expert_hidden,
            f"{prefix}.attention.head_count": s.heads,
            f"{prefix}.attention.head_count_kv": s.kv_heads,
            f"{prefix}.attention.key_length": s.head_dim,
            f"{prefix}.attention.value_length": s.head_dim,
            f"{prefix}.attention.layer_norm_rms_epsilon": 1e-6,
            f"{prefix}.rope.freq_base": 1.5e6,
            f"{prefix}.rope.dimension_count": s.head_dim,
            f"{prefix}.expert_count": s.experts,
            f"{prefix}.expert_used_count": s.used,
            f"{prefix}.expert_gating_func": _SOFTMAX if s.softmax else _SIGMOID,
            f"{prefix}.vocab_size": s.vocab,
            f"{prefix}.expert_frequency": np.concatenate(frequency).astype(np.float32),
            f"{prefix}.neuron_sparsity": np.array([target_sparsity(i) for i in range(s.layers)], np.float32),
            "synth.seed": self.seed,
            "synth.text_overlap": self.overlap,
            "synth.independent_overlap": self.routing.independent_overlap,
        }
        if s.window:
            values[f"{prefix}.attention.sliding_window"] = s.window
        if self.head_share is not None:
            values[f"{prefix}.head_predictor.width"] = self._predictor_width
            values[f"{prefix}.head_predictor.threshold"] = self._predictor_threshold()
        return values | synthetic_vocabulary(s.vocab)

    def data(self, name: str) -> Iterator[NDArray[np.generic]]:
        """One tensor's bytes in chunks."""
        random = np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(name.encode())]))
        part = name.removesuffix(".weight")
        if part in ("token_embd", "output"):
            yield from self._vocabulary_rows(random)
            return
        if part == "output_norm":
            yield self._output_norm()
            return
        if part == "head_predictor.down":
            yield _random_blocks(random, self._predictor_width, self._blocks, self.shape.hidden**-0.5)
            return
        if part == "head_predictor.up":
            std, blocks = self._predictor_width**-0.5, self._predictor_width // _BLOCK
            for start in range(0, self.shape.vocab, 4096):
                yield _random_blocks(random, min(4096, self.shape.vocab - start), blocks, std)
            return
        _, number, kind = part.split(".")
        layer, s = int(number), self.shape
        read = math.sqrt(self._read_energy(layer, after_attention=kind.startswith("ffn")))
        if kind == "attn_norm":
            yield np.ones(s.hidden, np.float32)
        elif kind == "ffn_norm":
            weights = np.ones(s.hidden, np.float32)
            weights[:_BLOCK] = self._rms(layer, after_attention=True)  # C is 1 after this norm
            yield weights
        elif kind in ("attn_q", "attn_k"):
            heads = s.heads if kind == "attn_q" else s.kv_heads
            yield self._reading(random, heads * s.head_dim, math.sqrt(_SCORE_STD) / read)
        elif kind == "attn_v":
            yield self._reading(random, s.kv_heads * s.head_dim, 1 / read)
        elif kind == "attn_output":
            width = s.heads * s.head_dim
            variance = _ATTENTION_SHARE * self._write_variance(layer) / width
            yield self._writing(random, width, math.sqrt(variance))
        elif kind == "ffn_gate_inp":
            yield self._router(random, layer)
        else:
            for _ in range(s.experts):
                if kind == "ffn_down_exps":
                    yield self._writing(random, s.expert_hidden, self._down_std(layer))
                else:
                    rows = self._reading(random, s.expert_hidden, 1 / read)
                    if kind == "ffn_gate_exps":
                        self._add_gate_biases(random, rows, layer)
                    yield rows

    def _write_variance(self, layer: int) -> float:
        return _FIRST_WRITE if layer == 0 else _GROWTH * self._o_variance[layer]

    def _o_at(self, layer: int, after_attention: bool) -> float:
        extra = _ATTENTION_SHARE * self._write_variance(layer) if after_attention else 0.0
        return self._o_variance[layer] + extra

    def _rms(self, layer: int, after_attention: bool) -> float:
        energy = self._fixed_energy + self._o_dims * self._o_at(layer, after_attention)
        return math.sqrt((_BLOCK + energy) / self.shape.hidden)

    def _read_energy(self, layer: int, after_attention: bool) -> float:
        """Squared length of G, T and O after a norm with weights of 1."""
        energy = self._fixed_energy + self._o_dims * self._o_at(layer, after_attention)
        return energy / self._rms(layer, after_attention) ** 2

    def _gate_mean(self, layer: int) -> float:
        """Mean gate of a layer; over its neurons and tokens, gates are normal with variance 1 + _BIAS_SPREAD²."""
        return -_NORMAL.inv_cdf(target_sparsity(layer)) * math.sqrt(1 + _BIAS_SPREAD**2)

    def _down_std(self, layer: int) -> float:
        mean, variance = self._gate_mean(layer), 1 + _BIAS_SPREAD**2
        ratio = mean / math.sqrt(variance)
        # E[relu(g)²] of a normal g; up has variance 1.
        activation = (mean**2 + variance) * _NORMAL.cdf(ratio) + mean * math.sqrt(variance) * _NORMAL.pdf(
            ratio
        )
        written = (1 - _ATTENTION_SHARE) * self._write_variance(layer)
        return math.sqrt(written / (self.routing.squared_weights * self.shape.expert_hidden * activation))

    def _reading(self, random: np.random.Generator, rows: int, std: float) -> Bytes:
        """Rows over the residual stream that do not read C."""
        blocks = _random_blocks(random, rows, self._blocks, std)
        blocks[:, 0, :2] = 0
        return blocks

    def _writing(self, random: np.random.Generator, columns: int, std: float) -> Bytes:
        """Rows of the residual stream that write to O only."""
        blocks = _random_blocks(random, self.shape.hidden, columns // _BLOCK, std)
        blocks[: self._o_begin * _BLOCK, :, :2] = 0
        return blocks

    def _add_gate_biases(self, random: np.random.Generator, rows: Bytes, layer: int) -> None:
        count = len(rows)
        spread = _BIAS_SPREAD * np.array([_NORMAL.inv_cdf((i + 0.5) / count) for i in range(count)])
        biases = self._gate_mean(layer) + random.permutation(spread)
        rows[:, 0, :2] = (biases / (7 * _BLOCK)).astype("<f2").view(np.uint8).reshape(-1, 2)
        rows[:, 0, 2:] = _CONSTANT_BYTE

    def _rank_of_expert(self, layer: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, layer]).permutation(self.shape.experts)

    def _router(self, random: np.random.Generator, layer: int) -> NDArray[np.float32]:
        """[E, D]; logits are ROUTER_SCALE * (bias + noise of variance 1)."""
        unforeseen = UNFORESEEN if layer else 0.0  # the embedding has almost no O
        group = self.routing.group_share
        weights = random.standard_normal((self.shape.experts, self.shape.hidden))
        g, t, o = (begin * _BLOCK for begin in (self._g_begin, self._t_begin, self._o_begin))
        for part, variance in (
            (weights[:, g:t], group),
            (weights[:, t:o], 1 - group - unforeseen),
            (weights[:, o:], unforeseen / self._o_variance[layer]),
        ):
            part *= np.sqrt(variance / (part**2).sum(1, keepdims=True))
        weights[:, :g] = self.routing.bias_E[self._rank_of_expert(layer), None] / _BLOCK
        return (ROUTER_SCALE * weights).astype(np.float32)

    def _group_codes(self) -> Bytes:
        """[groups, blocks of G, 16]: the quantised group part; embedding and head share it."""
        random = np.random.default_rng([self.seed, zlib.crc32(b"groups")])
        shape = (
            -(-self.shape.vocab // group_size(self.shape.vocab)),
            self._t_begin - self._g_begin,
            _BLOCK // 2,
        )
        return np.frombuffer(random.bytes(math.prod(shape)).translate(_PAIRS), np.uint8).reshape(shape)

    def _vocabulary_rows(self, random: np.random.Generator) -> Iterator[Bytes]:
        codes, size = self._group_codes(), group_size(self.shape.vocab)
        one = np.array([1 / 7, 1 / _LEVEL_STD], "<f2").view(np.uint8).reshape(2, 2)
        for start in range(0, self.shape.vocab, 4096):
            ids = np.arange(start, min(start + 4096, self.shape.vocab))
            rows = np.concatenate(
                [
                    _random_blocks(random, len(ids), self._o_begin, 1.0),
                    _random_blocks(random, len(ids), self._blocks - self._o_begin, _EMBEDDING_OUTPUT_STD),
                ],
                axis=1,
            )
            rows[:, 0, :2], rows[:, 0, 2:] = one[0], _CONSTANT_BYTE
            rows[:, self._g_begin : self._t_begin, :2] = one[1]
            rows[:, self._g_begin : self._t_begin, 2:] = codes[ids // size]
            yield rows

    @property
    def _predictor_width(self) -> int:
        """The 21B's published predictor has 256, a tenth of its hidden size; 128 is as much of the 4B's."""
        return 256 if self.shape.hidden >= 2048 else 128

    def _predictor_threshold(self) -> float:
        """Random rows' scores are normal: the states' length, about equal for all, over the root of the hidden size."""
        assert self.head_share is not None
        from_o = (_LOGIT_STD / _EMBEDDING_OUTPUT_STD) ** 2
        from_g = (_GROUP_BOOST * _LOGIT_STD) ** 2 / self._g_dims
        return -_NORMAL.inv_cdf(self.head_share) * math.sqrt((from_o + from_g) / self.shape.hidden)

    def _output_norm(self) -> NDArray[np.float32]:
        """Reads O and, for the boost of the current group, G."""
        o_std = math.sqrt(self._o_variance[-1])
        rms = math.sqrt((_BLOCK + self._fixed_energy + self._o_dims * o_std**2) / self.shape.hidden)
        weights = np.zeros(self.shape.hidden, np.float32)
        weights[self._o_begin * _BLOCK :] = (
            _LOGIT_STD * rms / (math.sqrt(self._o_dims) * _EMBEDDING_OUTPUT_STD * o_std)
        )
        weights[self._g_begin * _BLOCK : self._t_begin * _BLOCK] = (
            _GROUP_BOOST * _LOGIT_STD * rms / self._g_dims
        )
        return weights


def _random_blocks(random: np.random.Generator, rows: int, blocks: int, std: float) -> Bytes:
    """Q4_0 blocks [rows, blocks, 18] of weights with this standard deviation; scales vary by block, in sign too."""
    count = rows * blocks
    raw = bytearray(random.bytes(count * _BLOCK_BYTES)).translate(_PAIRS)
    result = np.frombuffer(raw, np.uint8).reshape(rows, blocks, _BLOCK_BYTES)
    size = np.linspace(0.75, 1.25, 128)
    size *= std / _LEVEL_STD / math.sqrt(float(np.mean(size**2)))
    table = np.concatenate([-size, size]).astype("<f2")
    scales = table[np.frombuffer(random.bytes(count), np.uint8)]
    result[:, :, :2] = scales.view(np.uint8).reshape(rows, blocks, 2)
    return result


def write(
    path: Path,
    shape: Shape,
    seed: int = 0,
    overlap: float = TEXT_OVERLAP,
    head_share: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a model in the stock layout.

    Args:
        head_share: add a random predictor of output rows that names about this share of them, scattered.
        progress: called with a few words before every tensor, and with none in the end.

    Raises:
        SynthError: the shape, the overlap or the share is impossible.
        OSError: the disk is full, …
    """
    synthesis = Synthesis(shape, seed, overlap, head_share)
    infos = synthesis.tensors()
    with GGUFWriter(path, synthesis.metadata(), infos) as writer:
        for index, info in enumerate(infos):
            if progress is not None:
                progress(f"tensor {index + 1} of {len(infos)}: {info.name}")
            writer.write(info.name, synthesis.data(info.name))
    if progress is not None:
        progress("")
