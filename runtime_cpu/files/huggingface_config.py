"""config.json of a SmallThinker model, checked: ``FolderConfig.parse(read_json(path))``.

It says which tensors the folder has to hold, and becomes the metadata of a GGUF file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from runtime_cpu.files.checkpoint_files import CheckpointError
from runtime_cpu.files.gguf_writer import TensorInfo, Value
from runtime_cpu.files.quantiser import BLOCK

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PREFIX = "smallthinker."
_SOFTMAX, _SIGMOID = 1, 2
_MAX_LAYERS = 10_000
# Switches of other architectures and of development versions: present, they may only say what SmallThinker does.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("smallthinker",),
    "rope_scaling": (None,),
    "attention_dropout": (0,),
    "attention_bias": (False, None),
    "hidden_act": ("relu", None),
    "quantization_config": (None,),
    "use_qk_norm": (False, None),
    "moe_enable_secondary_experts": (False, None),
    "moe_shared_primary_experts": (0, None),
}


class ConfigReader:
    """Typed values of a JSON object, with messages that name the file and the key."""

    def __init__(self, contents: Mapping[str, Any], source: str) -> None:
        self._contents = contents
        self._source = source

    def check_kind(self) -> None:
        """Refuse what is not a plain SmallThinker."""
        architectures = self._contents.get("architectures")
        if architectures is not None and (
            not isinstance(architectures, list) or "SmallThinkerForCausalLM" not in architectures
        ):
            raise CheckpointError(
                f"{self._source} describes {str(architectures)[:80]}; SmallThinkerForCausalLM is needed"
            )
        for key, allowed in _FIXED.items():
            if key in self._contents and self._contents[key] not in allowed:
                self._refuse(key, f"{allowed[0]!r} is all that SmallThinker knows")

    def _refuse(self, key: str, needed: str) -> NoReturn:
        if key not in self._contents:
            raise CheckpointError(f"{self._source} lacks {key}")
        raise CheckpointError(f"{self._source}: {key} is {str(self._contents[key])[:80]!r}; {needed}")

    def count(self, key: str, most: int = (1 << 31) - 1, default: int | None = None) -> int:
        value = self._contents.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self._refuse(key, f"a whole number from 1 to {most} is needed")
        return int(value)

    def lead(self) -> int:
        value = self._contents.get("router_lead", 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_LAYERS:
            self._refuse("router_lead", f"a whole number from 0 to {_MAX_LAYERS} is needed")
        return int(value)

    def number(self, key: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        with np.errstate(over="ignore"):
            single = float(np.float32(number))
        if not 0 < single < math.inf:
            self._refuse(key, "a positive number is needed")
        return number

    def switch(self, key: str, default: bool) -> bool:
        value = self._contents.get(key, default)
        if not isinstance(value, bool):
            self._refuse(key, "true or false is needed")
        return bool(value)

    def layout(self, key: str, layers: int, default: int) -> tuple[int, ...]:
        value = self._contents.get(key)
        if value is None:
            return (default,) * layers
        if not isinstance(value, list) or len(value) != layers or not all(v in (0, 1) for v in value):
            self._refuse(key, f"one 0 or 1 for each of the {layers} layers is needed")
        return tuple(int(v) for v in value)

    def ids(self, key: str) -> tuple[int, ...]:
        value = self._contents.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in ids):
            self._refuse(key, "a token id, or a list of them, is needed")
        return tuple(ids)

    def rope_theta(self) -> Any:
        """As released, or in the dictionary that transformers 5 writes."""
        parameters = self._contents.get("rope_parameters")
        if isinstance(parameters, dict):
            if parameters.get("rope_type", "default") != "default":
                self._refuse("rope_parameters", "unscaled RoPE is needed")
            return parameters.get("rope_theta", self._contents.get("rope_theta"))
        return self._contents.get("rope_theta")


@dataclass(frozen=True)
class FolderConfig:
    """What config.json says, under its own names; :meth:`parse` checks it."""

    name: str | None
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    moe_ffn_hidden_size: int
    moe_num_primary_experts: int
    moe_num_active_primary_experts: int
    max_position_embeddings: int
    vocab_size: int
    sliding_window_size: int
    rope_layout: tuple[int, ...]
    sliding_window_layout: tuple[int, ...]
    rope_theta: float
    rms_norm_eps: float
    softmax: bool
    router_lead: int
    tied: bool
    eos_ids: tuple[int, ...]

    @classmethod
    def parse(cls, contents: Mapping[str, Any], source: str = "config.json") -> FolderConfig:
        """From the JSON object.

        Keys that give a matrix its shape or its meaning have to be there, except those that the released files leave
        out (spec: ``moe_primary_router_apply_softmax``) and those that transformers leaves out at their default.

        Raises:
            CheckpointError: a value is missing or impossible.
        """
        reader = ConfigReader(contents, source)
        reader.check_kind()
        count = reader.count
        layers = count("num_hidden_layers", most=_MAX_LAYERS)
        windowed = reader.layout("sliding_window_layout", layers, 0)
        config = cls(
            name=contents["model_name"] if isinstance(contents.get("model_name"), str) else None,
            hidden_size=count("hidden_size"),
            num_hidden_layers=layers,
            num_attention_heads=count("num_attention_heads"),
            num_key_value_heads=count("num_key_value_heads"),
            head_dim=count("head_dim"),
            moe_ffn_hidden_size=count("moe_ffn_hidden_size"),
            moe_num_primary_experts=count("moe_num_primary_experts"),
            moe_num_active_primary_experts=count("moe_num_active_primary_experts"),
            max_position_embeddings=count("max_position_embeddings"),
            vocab_size=count("vocab_size"),
            sliding_window_size=count("sliding_window_size", default=None if any(windowed) else 4096),
            rope_layout=reader.layout("rope_layout", layers, 1),
            sliding_window_layout=windowed,
            rope_theta=reader.number("rope_theta", reader.rope_theta()),
            rms_norm_eps=reader.number("rms_norm_eps", contents.get("rms_norm_eps")),
            softmax=reader.switch("moe_primary_router_apply_softmax", False),
            router_lead=reader.lead(),
            tied=reader.switch("tie_word_embeddings", True),
            eos_ids=reader.ids("eos_token_id"),
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{source}: num_attention_heads is {config.num_attention_heads}, no multiple of num_key_value_heads, "
                f"{config.num_key_value_heads}"
            )
        if config.head_dim % 2:
            raise CheckpointError(f"{source}: head_dim is {config.head_dim}; RoPE needs an even number")
        if config.moe_num_active_primary_experts > config.moe_num_primary_experts:
            raise CheckpointError(
                f"{source}: moe_num_active_primary_experts is {config.moe_num_active_primary_experts} of "
                f"{config.moe_num_primary_experts} experts"
            )
        return config

    def metadata(self, name: str, file_type: int) -> dict[str, Value]:
        """The model's keys, in the order in which the exporter writes them."""
        u32, f32 = np.uint32, np.float32
        result: dict[str, Value] = {
            # Readers that do not know the lead have to refuse such a file.
            "general.architecture": "smallthinker-lead" if self.router_lead else "smallthinker",
            "general.name": name,
            "general.file_type": u32(file_type),
            "general.quantization_version": u32(2),
            f"{_PREFIX}block_count": u32(self.num_hidden_layers),
            f"{_PREFIX}context_length": u32(self.max_position_embeddings),
            f"{_PREFIX}embedding_length": u32(self.hidden_size),
            f"{_PREFIX}feed_forward_length": u32(self.moe_ffn_hidden_size),
            f"{_PREFIX}expert_feed_forward_length": u32(self.moe_ffn_hidden_size),
            f"{_PREFIX}attention.head_count": u32(self.num_attention_heads),
            f"{_PREFIX}attention.head_count_kv": u32(self.num_key_value_heads),
            f"{_PREFIX}attention.key_length": u32(self.head_dim),
            f"{_PREFIX}attention.value_length": u32(self.head_dim),
            f"{_PREFIX}rope.freq_base": f32(self.rope_theta),
            f"{_PREFIX}rope.dimension_count": u32(self.head_dim),
            f"{_PREFIX}attention.layer_norm_rms_epsilon": f32(self.rms_norm_eps),
            f"{_PREFIX}expert_count": u32(self.moe_num_primary_experts),
            f"{_PREFIX}expert_used_count": u32(self.moe_num_active_primary_experts),
            # Always written: without it one engine routes a sigmoid model by softmax.
            f"{_PREFIX}expert_gating_func": u32(_SOFTMAX if self.softmax else _SIGMOID),
            f"{_PREFIX}vocab_size": u32(self.vocab_size),
        }
        if self.router_lead:
            result[f"{_PREFIX}router_lead"] = u32(self.router_lead)
        if any(self.sliding_window_layout):
            result[f"{_PREFIX}attention.sliding_window"] = u32(self.sliding_window_size)
        result[f"{_PREFIX}rope_layout"] = np.asarray(self.rope_layout, np.int32)
        result[f"{_PREFIX}sliding_window_layout"] = np.asarray(self.sliding_window_layout, np.int32)
        return result

    def tensors(self) -> Iterator[FolderTensor]:
        """Every tensor of the GGUF file, in its order; lazily, for config.json may promise any number of layers."""
        width, heads = self.hidden_size, self.num_attention_heads * self.head_dim
        key = self.num_key_value_heads * self.head_dim
        experts, hidden = self.moe_num_primary_experts, self.moe_ffn_hidden_size

        def plain(gguf: str, name: str, *shape: int) -> FolderTensor:
            return FolderTensor(f"{gguf}.weight", name, 0, shape)

        yield plain("token_embd", EMBEDDING, self.vocab_size, width)
        for layer in range(self.num_hidden_layers):
            block, source = f"blk.{layer}.", f"model.layers.{layer}."
            moe = f"{source}block_sparse_moe."
            yield plain(f"{block}attn_norm", f"{source}input_layernorm.weight", width)
            yield plain(f"{block}attn_q", f"{source}self_attn.q_proj.weight", heads, width)
            yield plain(f"{block}attn_k", f"{source}self_attn.k_proj.weight", key, width)
            yield plain(f"{block}attn_v", f"{source}self_attn.v_proj.weight", key, width)
            yield plain(f"{block}attn_output", f"{source}self_attn.o_proj.weight", width, heads)
            yield plain(f"{block}ffn_norm", f"{source}post_attention_layernorm.weight", width)
            yield plain(f"{block}ffn_gate_inp", f"{moe}primary_router.weight", experts, width)
            for part, shape in (
                ("gate", (hidden, width)),
                ("up", (hidden, width)),
                ("down", (width, hidden)),
            ):
                name = f"{moe}experts.{{}}.{part}.weight"
                yield FolderTensor(f"{block}ffn_{part}_exps.weight", name, experts, shape)
        yield plain("output_norm", "model.norm.weight", width)
        if not self.tied:
            yield plain("output", HEAD, self.vocab_size, width)


@dataclass(frozen=True)
class FolderTensor:
    """A tensor of the GGUF file and where it comes from.

    Attributes:
        gguf: its name in the file.
        pattern: its name in the folder; of a stack of ``experts``, the name with ``{}`` for the expert.
        experts: 0 for a single matrix.
        shape: of one matrix, [rows, columns], or of a vector.
    """

    gguf: str
    pattern: str
    experts: int
    shape: tuple[int, ...]

    @property
    def names(self) -> Iterator[str]:
        """Official names, in the order of the data."""
        if not self.experts:
            yield self.pattern
        for expert in range(self.experts):
            yield self.pattern.format(expert)

    def info(self, kind: str) -> TensorInfo:
        """Its entry in a file of type ``kind`` (``"Q4_0"``); rows that blocks do not divide become F16."""
        columns = self.shape[-1]
        if self.gguf.endswith(("_norm.weight", "ffn_gate_inp.weight")):
            kind = "F32"
        elif kind in ("Q4_0", "Q8_0") and columns % BLOCK:
            kind = "F16"
        shape = (*self.shape[::-1], self.experts) if self.experts else self.shape[::-1]
        return TensorInfo(self.gguf, kind, shape)
