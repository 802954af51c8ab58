"""SmallThinker's configuration under the official key names: ``SmallThinkerConfig.from_pretrained(folder)``.

The keys are those of the released ``config.json`` files (Tiiny/SmallThinker-4BA0.6B-Instruct and -21BA3B-Instruct).
The two releases differ in more than size: the 21B mixes NoPE-global and RoPE-windowed layers 1:3 and weighs experts by
softmax; the 4B applies RoPE and global attention everywhere and weighs experts by normalised sigmoids, which its file
says only by *leaving out* ``moe_primary_router_apply_softmax``.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

# Keys that release files or older re-serialisations carry and that say nothing new: derived, or never read.
_IGNORED_KEYS = (
    "auto_map",
    "layer_types",
    "max_length",
    "repetition_penalty",
    "sliding_window",
    "sliding_window_pattern",
    "temperature",
    "top_p",
)
# The order in which the official keys are written.
_OFFICIAL_KEYS = (
    "architectures",
    "model_name",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "moe_ffn_hidden_size",
    "moe_num_primary_experts",
    "moe_num_active_primary_experts",
    "moe_primary_router_apply_softmax",
    "norm_topk_prob",
    "rope_layout",
    "sliding_window_layout",
    "sliding_window_size",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
    "attention_dropout",
    "initializer_range",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "output_router_logits",
)
# Ours; written only when set, so that an exported file holds official keys alone.
_TRAINING_KEYS = ("load_balance_coef", "router_z_coef", "router_lead")


class ConfigError(ValueError):
    """A configuration value is impossible; the message names the key, its value and what is allowed."""


class SmallThinkerConfig(PreTrainedConfig):
    """Configuration of a SmallThinker model.

    Attributes:
        hidden_size: width D of the residual stream.
        num_hidden_layers: layers L.
        num_attention_heads: query heads N; ``N * head_dim`` need not equal D (it does not in the 21B).
        num_key_value_heads: key/value heads; must divide N.
        head_dim: H; even, since RoPE pairs dimension i with i + H/2.
        moe_ffn_hidden_size: hidden width F of one expert.
        moe_num_primary_experts: experts E of a layer.
        moe_num_active_primary_experts: K experts per token.
        moe_primary_router_apply_softmax: True: softmax over the chosen logits (21B). False: their sigmoids divided
            by the sigmoids' sum (4B). A file without the key means False.
        rope_layout: per layer 1 for RoPE, 0 for NoPE. ``None``: RoPE everywhere.
        sliding_window_layout: per layer 1 for windowed, 0 for global attention; independent of ``rope_layout``.
            ``None``: global everywhere.
        sliding_window_size: W; a windowed token sees itself and W - 1 tokens before it.
        rope_theta: RoPE base. Numeric strings such as ``"1.5e6"`` are accepted.
        tie_word_embeddings: the output matrix is the embedding.
        load_balance_coef: weight of each layer's load-balance loss in ``output.loss`` (ours, not official).
        router_z_coef: weight of each layer's router z-loss in it (ours, not official).
        router_lead: the router of layer l reads the residual stream as it enters layer ``max(0, l - router_lead)``,
            so that an engine knows a layer's experts that many layers ahead (ours; 0 is the released architecture,
            whose code computes another function of the same weights).

    Raises:
        ConfigError: a value is impossible or two values contradict each other.
    """

    model_type = "smallthinker"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "moe_num_primary_experts",
        "num_experts_per_tok": "moe_num_active_primary_experts",
        "moe_intermediate_size": "moe_ffn_hidden_size",
    }

    model_name: str | None = None
    vocab_size: int = 151936
    hidden_size: int = 1536
    num_hidden_layers: int = 32
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    head_dim: int = 128
    moe_ffn_hidden_size: int = 768
    moe_num_primary_experts: int = 32
    moe_num_active_primary_experts: int = 4
    moe_primary_router_apply_softmax: bool = False
    norm_topk_prob: bool = True
    rope_layout: list[int] | None = None
    sliding_window_layout: list[int] | None = None
    sliding_window_size: int = 4096
    rope_theta: float | int | str = 1.5e6
    rope_scaling: dict[str, Any] | None = None  # a property in the parent
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tokenizer_class: str | None = None
    use_cache: bool = True
    output_router_logits: bool = False
    load_balance_coef: float = 0.0
    router_z_coef: float = 0.0
    router_lead: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        for key in _IGNORED_KEYS:
            kwargs.pop(key, None)
        # transformers 5 writes RoPE as a dictionary; accept that form too.
        rope_parameters = kwargs.pop("rope_parameters", None)
        if rope_parameters and "rope_theta" in rope_parameters:
            self.rope_theta = rope_parameters["rope_theta"]
            if rope_parameters.get("rope_type", "default") != "default":
                raise ConfigError(
                    f"rope_parameters {rope_parameters} asks for a scaled RoPE; only 'default' exists here."
                )
        super().__post_init__(**kwargs)
        try:
            self.rope_theta = float(self.rope_theta)
        except ValueError:
            raise ConfigError(f"rope_theta is {self.rope_theta!r}; a positive number is needed.") from None
        layers = self.num_hidden_layers
        self.rope_layout = [1] * layers if self.rope_layout is None else [int(v) for v in self.rope_layout]
        self.sliding_window_layout = (
            [0] * layers
            if self.sliding_window_layout is None
            else [int(v) for v in self.sliding_window_layout]
        )
        if self.architectures is None:
            self.architectures = ["SmallThinkerForCausalLM"]
        self._check()

    def _check(self) -> None:
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "moe_ffn_hidden_size",
            "moe_num_primary_experts",
            "moe_num_active_primary_experts",
            "sliding_window_size",
            "max_position_embeddings",
        ):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; at least 1 is needed.")
        for key in ("rope_layout", "sliding_window_layout"):
            layout = getattr(self, key)
            if len(layout) != self.num_hidden_layers or not set(layout) <= {0, 1}:
                raise ConfigError(
                    f"{key} is {layout}; it needs one 0 or 1 for each of the {self.num_hidden_layers} layers."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads, which is {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; RoPE needs an even number.")
        if self.moe_num_active_primary_experts > self.moe_num_primary_experts:
            raise ConfigError(
                f"moe_num_active_primary_experts is {self.moe_num_active_primary_experts}; it cannot exceed "
                f"moe_num_primary_experts, which is {self.moe_num_primary_experts}."
            )
        if float(self.rope_theta) <= 0:
            raise ConfigError(f"rope_theta is {self.rope_theta}; it must be positive.")
        if self.sliding_window_size < 2 and any(self.sliding_window_layout or []):
            raise ConfigError(
                f"sliding_window_size is {self.sliding_window_size}; a windowed layer needs 2 or more."
            )
        if type(self.router_lead) is not int or self.router_lead < 0:
            raise ConfigError(f"router_lead is {self.router_lead!r}; a whole number from 0 on is needed.")
        if self.rope_scaling is not None:
            raise ConfigError(
                f"rope_scaling is {self.rope_scaling}; SmallThinker uses unscaled RoPE: null is needed."
            )
        if self.attention_dropout:
            raise ConfigError(
                f"attention_dropout is {self.attention_dropout}; the official code uses 0 only."
            )

    @property
    def layer_types(self) -> list[str]:
        """Kind of KV cache per layer, as transformers' caches read it."""
        return [
            "sliding_attention" if flag else "full_attention" for flag in self.sliding_window_layout or []
        ]

    @property
    def sliding_window(self) -> int:
        """The window in tokens, under the name that transformers' caches read."""
        return self.sliding_window_size

    def to_diff_dict(self) -> dict[str, Any]:
        """The contents of ``config.json``: official keys, so that other implementations can read the file."""
        written: dict[str, Any] = {"model_type": self.model_type}
        written.update({key: getattr(self, key) for key in _OFFICIAL_KEYS})
        written.update({key: getattr(self, key) for key in _TRAINING_KEYS if getattr(self, key)})
        if self.pad_token_id is not None:
            written["pad_token_id"] = self.pad_token_id
        if self.model_name is None:
            del written["model_name"]
        dtype = self.dtype
        written["torch_dtype"] = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        if self.tokenizer_class is not None:
            written["tokenizer_class"] = self.tokenizer_class
        written["transformers_version"] = self.to_dict()["transformers_version"]
        return written
