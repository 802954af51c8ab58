"""GGUF files of architecture ``smallthinker``: ``write_gguf(checkpoint, {"f32": path}, ...)`` and
``GGUFModel(path)``.

Layout and names are llama.cpp's, so that its readers open the files. Two keys are ours:
``smallthinker.rope_layout`` and ``smallthinker.sliding_window_layout`` (int32 per layer); without them a
reader can only guess which layers window.
Tensors stream: one stacked parameter is in memory at a time, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, GGUFWriter, LlamaFileType, quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from components.artifacts import StageError
from components.export.head_predictor import HeadPredictor
from components.export.vocabulary import Vocabulary
from model import OfficialCheckpoint, SmallThinkerConfig
from model.checkpoint import parameter_shapes

ARCHITECTURE = "smallthinker"
# With a router lead: readers that do not know it have to refuse the file, whose keys keep the prefix above.
_LEAD_ARCHITECTURE = f"{ARCHITECTURE}-lead"
# llama.cpp ignores the file's window and uses this one; see spec of its smallthinker loader.
LLAMA_CPP_WINDOW = 4096
_SOFTMAX, _SIGMOID = 1, 2
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_QUANTISED = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
_PLAIN_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "block_sparse_moe.primary_router.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.experts.down_proj": "ffn_down_exps.weight",
}
_GATE_UP = "block_sparse_moe.experts.gate_up_proj"
_FULL_PRECISION = ("_norm.weight", "ffn_gate_inp.weight")

Array = npt.NDArray[Any]


def gguf_names(parameter: str) -> list[str]:
    """GGUF names of a parameter in memory; the stacked gate and up become two tensors."""
    if parameter in _PLAIN_NAMES:
        return [_PLAIN_NAMES[parameter]]
    _, _, number, rest = parameter.split(".", 3)
    if rest == _GATE_UP:
        return [f"blk.{number}.ffn_gate_exps.weight", f"blk.{number}.ffn_up_exps.weight"]
    return [f"blk.{number}.{_LAYER_NAMES[rest]}"]


def tensor_precision(
    name: str, columns: int, file_type: str, output: str, tied: bool
) -> GGMLQuantizationType:
    """Precision of one tensor in a file.

    Norms and routers stay in float32: they are small, and a router's rounding changes which experts run.
    Rows that Q4_0's blocks of 32 do not divide are stored in float16, as llama.cpp does.
    """
    if name.endswith(_FULL_PRECISION):
        return GGMLQuantizationType.F32
    chosen = file_type
    if file_type == "q4_0" and name == ("token_embd.weight" if tied else "output.weight"):
        chosen = output
    precision = _QUANTISED[chosen]
    if columns % GGML_QUANT_SIZES[precision][0]:
        return GGMLQuantizationType.F16
    return precision


@dataclass(frozen=True)
class ActivationStats:
    """Expert statistics that travel with the weights.

    Attributes:
        expert_frequency: ``[L][E]`` share of tokens that choose each expert.
        neuron_sparsity: ``[L][E or 1]`` share of an expert's neurons that are inactive; may be empty.
    """

    expert_frequency: list[list[float]]
    neuron_sparsity: list[list[float]]

    @classmethod
    def parse(cls, contents: Mapping[str, Any], config: SmallThinkerConfig) -> ActivationStats:
        """From ``activation_stats.json``.

        Raises:
            StageError: its lists do not fit the model.
        """
        frequency = contents.get("expert_frequency")
        shape = (config.num_hidden_layers, config.moe_num_primary_experts)
        if not isinstance(frequency, list) or list(np.shape(frequency)) != list(shape):
            raise StageError(
                f"activation_stats.json: expert_frequency has shape {np.shape(frequency or [])}; "
                f"{shape[0]} layers x {shape[1]} experts are needed."
            )
        sparsity = contents.get("neuron_sparsity") or []
        rows = [row if isinstance(row, list) else [row] for row in sparsity]
        if rows and (len(rows) != shape[0] or len({len(row) for row in rows}) != 1):
            raise StageError(
                "activation_stats.json: neuron_sparsity needs one row of equal length per layer."
            )
        return cls(frequency, rows)


def _write_metadata(
    writer: GGUFWriter,
    config: SmallThinkerConfig,
    name: str,
    file_type: str,
    vocabulary: Vocabulary | None,
    stats: ActivationStats | None,
) -> None:
    assert config.rope_layout is not None and config.sliding_window_layout is not None
    writer.add_name(name)
    writer.add_file_type(int(_FILE_TYPES[file_type]))
    writer.add_quantization_version(2)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.moe_ffn_hidden_size)
    writer.add_expert_feed_forward_length(config.moe_ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_theta))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.moe_num_primary_experts)
    writer.add_expert_used_count(config.moe_num_active_primary_experts)
    # Always written: without it one engine routes a sigmoid model by softmax.
    writer.add_uint32(
        f"{ARCHITECTURE}.expert_gating_func",
        _SOFTMAX if config.moe_primary_router_apply_softmax else _SIGMOID,
    )
    writer.add_vocab_size(config.vocab_size)
    if config.router_lead:
        writer.add_uint32(f"{ARCHITECTURE}.router_lead", config.router_lead)
    if any(config.sliding_window_layout):
        writer.add_sliding_window(config.sliding_window_size)
    writer.add_array(f"{ARCHITECTURE}.rope_layout", config.rope_layout)
    writer.add_array(f"{ARCHITECTURE}.sliding_window_layout", config.sliding_window_layout)
    if stats is not None:
        flat = [float(value) for row in stats.expert_frequency for value in row]
        writer.add_array(f"{ARCHITECTURE}.expert_frequency", flat)
        if stats.neuron_sparsity:
            flat = [float(value) for row in stats.neuron_sparsity for value in row]
            writer.add_array(f"{ARCHITECTURE}.neuron_sparsity", flat)
    if vocabulary is not None:
        vocabulary.write(writer)


def write_gguf(
    checkpoint: OfficialCheckpoint,
    paths: Mapping[str, Path],
    name: str,
    vocabulary: Vocabulary | None,
    stats: ActivationStats | None = None,
    output: str = "q8_0",
    config: SmallThinkerConfig | None = None,
    advance: Callable[[int], None] | None = None,
    predictor: HeadPredictor | None = None,
) -> None:
    """Write one file per precision in a single pass over the checkpoint.

    A tied model gets no ``output.weight``: readers fall back to ``token_embd.weight``.

    Args:
        checkpoint: the weights.
        paths: file by precision (``f32``, ``f16``, ``q4_0``); each appears by a rename when it is whole.
        name: the model's name.
        vocabulary: the tokenizer; ``None`` writes a file without one.
        stats: expert statistics, if known.
        output: precision of the output matrix in a ``q4_0`` file.
        config: overrides the checkpoint's configuration in the metadata.
        predictor: of the output rows that matter, for engines that are asked to use it.
        advance: called with the number of parameters written, for a progress bar.
    """
    config = config or checkpoint.config
    tied = config.tie_word_embeddings
    writers: dict[str, GGUFWriter] = {}
    partial = {kind: path.with_name(f".{path.name}.partial") for kind, path in paths.items()}
    for kind, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(partial[kind], _LEAD_ARCHITECTURE if config.router_lead else ARCHITECTURE)
        writer.arch = ARCHITECTURE
        _write_metadata(writer, config, name, kind, vocabulary, stats)
        for parameter, shape in parameter_shapes(config).items():
            names = gguf_names(parameter)
            shape = (shape[0], shape[1] // len(names), *shape[2:]) if len(shape) == 3 else shape
            for tensor_name in names:
                _declare(
                    writer, tensor_name, shape, tensor_precision(tensor_name, shape[-1], kind, output, tied)
                )
        if predictor is not None:
            _declare_predictor(writer, predictor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writers[kind] = writer
    try:
        for parameter, tensor in checkpoint.stacked():
            names = gguf_names(parameter)
            for tensor_name, part in zip(
                names, tensor.chunk(len(names), dim=1 if len(names) > 1 else 0), strict=True
            ):
                values: Array = part.float().contiguous().numpy()
                for kind, writer in writers.items():
                    precision = tensor_precision(tensor_name, values.shape[-1], kind, output, tied)
                    writer.write_tensor_data(_encode(values, precision))
            if advance is not None:
                advance(tensor.numel())
        if predictor is not None:
            for writer in writers.values():
                writer.write_tensor_data(_encode(predictor.down, predictor.precision))
                writer.write_tensor_data(_encode(predictor.up, predictor.precision))
    finally:
        for writer in writers.values():
            writer.close()
    for kind, path in paths.items():
        partial[kind].replace(path)


def _declare_predictor(writer: GGUFWriter, predictor: HeadPredictor) -> None:
    prefix = f"{ARCHITECTURE}.head_predictor"
    writer.add_uint32(f"{prefix}.width", predictor.down.shape[0])
    writer.add_float32(f"{prefix}.threshold", predictor.threshold)
    writer.add_float32(f"{prefix}.recall", predictor.report["recall"])
    writer.add_float32(f"{prefix}.missed_argmax", predictor.report["missed_argmax"])
    _declare(writer, "head_predictor.down.weight", predictor.down.shape, predictor.precision)
    _declare(writer, "head_predictor.up.weight", predictor.up.shape, predictor.precision)


def _declare(writer: GGUFWriter, name: str, shape: tuple[int, ...], precision: GGMLQuantizationType) -> None:
    count = int(np.prod(shape))
    if precision in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if precision == GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, count * dtype.itemsize)
        return
    block, size = GGML_QUANT_SIZES[precision]
    byte_shape = (*shape[:-1], shape[-1] // block * size)
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), count // block * size, raw_dtype=precision)


def _encode(values: Array, precision: GGMLQuantizationType) -> Array:
    if precision == GGMLQuantizationType.F32:
        return values
    if precision == GGMLQuantizationType.F16:
        return values.astype(np.float16)
    encoded: Array = quants.quantize(values, precision)
    return encoded


class GGUFModel:
    """A GGUF file read back as a model's parameters, to verify what was written."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            StageError: it is not a GGUF file of this architecture.
        """
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise StageError(f"{path} is not a readable GGUF file: {error}.") from error
        self.metadata: dict[str, Any] = {
            key: field.contents() for key, field in self._reader.fields.items() if not key.startswith("GGUF.")
        }
        if self.metadata.get("general.architecture") not in (ARCHITECTURE, _LEAD_ARCHITECTURE):
            raise StageError(
                f"{path} holds {self.metadata.get('general.architecture')!r}, not {ARCHITECTURE!r} or "
                f"{_LEAD_ARCHITECTURE!r}."
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def config(self) -> SmallThinkerConfig:
        """The configuration that the metadata describe, by llama.cpp's rule where our layout keys are missing."""

        def get(key: str, needed: bool = True) -> Any:
            name = f"{ARCHITECTURE}.{key}"
            if needed and name not in self.metadata:
                raise StageError(f"The GGUF file lacks the key {name}.")
            return self.metadata.get(name)

        layers = get("block_count")
        window = get("attention.sliding_window", needed=False)
        stock = [int(window is not None and layer % 4 != 0) for layer in range(layers)]
        return SmallThinkerConfig(
            vocab_size=get("vocab_size", needed=False) or int(self._tensors["token_embd.weight"].shape[1]),
            hidden_size=get("embedding_length"),
            num_hidden_layers=layers,
            num_attention_heads=get("attention.head_count"),
            num_key_value_heads=get("attention.head_count_kv"),
            head_dim=get("attention.key_length"),
            moe_ffn_hidden_size=get("expert_feed_forward_length"),
            moe_num_primary_experts=get("expert_count"),
            moe_num_active_primary_experts=get("expert_used_count"),
            moe_primary_router_apply_softmax=get("expert_gating_func") == _SOFTMAX,
            router_lead=get("router_lead", needed=False) or 0,
            rope_layout=get("rope_layout", needed=False) or (stock if window is not None else [1] * layers),
            sliding_window_layout=get("sliding_window_layout", needed=False) or stock,
            sliding_window_size=window or LLAMA_CPP_WINDOW,
            rope_theta=get("rope.freq_base"),
            rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=get("context_length"),
            tie_word_embeddings="output.weight" not in self._tensors,
            bos_token_id=self.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.metadata.get("tokenizer.ggml.eos_token_id"),
        )

    def precision(self, name: str) -> str:
        """The type of a tensor, for example ``Q4_0``."""
        return str(self._tensors[name].tensor_type.name)

    @property
    def names(self) -> list[str]:
        """The tensors' GGUF names, in file order."""
        return list(self._tensors)

    def read(self, name: str) -> Array:
        """A tensor's values in float32.

        Raises:
            StageError: there is no such tensor.
        """
        if name not in self._tensors:
            raise StageError(f"The GGUF file holds no tensor {name}.")
        tensor = self._tensors[name]
        values: Array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        return values

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters as they lie in memory, one at a time, in float32."""
        for parameter in parameter_shapes(self.config):
            parts = [self.read(name) for name in gguf_names(parameter)]
            values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            yield parameter, torch.from_numpy(np.array(values, dtype=np.float32))


def stock_layout_limit(config: SmallThinkerConfig) -> int | None:
    """Tokens up to which a reader that ignores our two keys and the window (llama.cpp) is exact; ``None``: any."""
    assert config.rope_layout is not None and config.sliding_window_layout is not None
    windowed = any(config.sliding_window_layout)
    period = [int(layer % 4 != 0) for layer in range(config.num_hidden_layers)]
    rope = period if windowed else [1] * config.num_hidden_layers
    if config.rope_layout != rope:
        return 0
    if windowed and (
        config.sliding_window_layout != period or config.sliding_window_size != LLAMA_CPP_WINDOW
    ):
        return min(config.sliding_window_size, LLAMA_CPP_WINDOW)
    return None
