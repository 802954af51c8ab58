"""SmallThinker as transformers classes: ``SmallThinkerForCausalLM.from_pretrained(folder)``.

One layer, with x the residual stream (arXiv 2507.20984 section 2):
``routing = router(x)``; ``y = x + attention(norm(x))``; ``x' = y + experts(norm(y), routing)``.
The router reads the *raw* x, before any norm, so that an engine can fetch experts while attention runs. With
``router_lead`` > 0 it reads the x of that many layers earlier, so that the engine knows further ahead what to fetch.

Legend: B batch, T tokens, D model, V vocabulary, L layers, E experts, K top-k.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from model.attention import Attention, RMSNorm, RotaryEmbedding
from model.checkpoint import OfficialTensor, parse_size, warn_untied, write_checkpoint
from model.compiling import takes_kernels
from model.configuration import SmallThinkerConfig
from model.experts import Backend, Experts, Router, count_experts
from model.losses import (
    LoadBalance,
    load_balance_loss,
    masked_mean,
    next_token_loss,
    router_scores,
    router_z,
)
from model.masks import LayerMask, build_layer_mask

AttentionBackend = Literal["auto", "flex", "sdpa"]


@dataclass
class RouterStats(ModelOutput):
    """What the routers and experts did in one forward; padding is not counted.

    Attributes:
        expert_counts: ``[L, E]`` int64, tokens that chose each expert.
        active_neurons: ``[L]`` int64, expert neurons with gate > 0 over all (token, chosen expert) pairs;
            divide by ``tokens * K * F`` for the share of active neurons.
        active_neurons_by_expert: ``[L, E]`` int64, the same per expert; divide by ``expert_counts * F``.
        mean_scores: ``[L, E]`` float32, mean router score of every expert (rows sum to 1).
        tokens: valid tokens.
        experts: ``[L, B, T, K]`` int64, each token's choice, most wanted first. Only within
        ``record_experts``.
    """

    expert_counts: Tensor | None = None
    active_neurons: Tensor | None = None
    active_neurons_by_expert: Tensor | None = None
    mean_scores: Tensor | None = None
    tokens: int | None = None
    experts: Tensor | None = None


@dataclass
class ModelOutputWithStats(ModelOutput):
    """Output of :class:`SmallThinkerModel`; see :class:`CausalLMOutput` for the shared fields."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    load_balance_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    router_stats: RouterStats | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """Output of :class:`SmallThinkerForCausalLM`.

    Attributes:
        loss: ``ce_loss + load_balance_coef * sum(load_balance_loss) + router_z_coef * sum(router_z_loss)``, sums
            over layers; with labels only.
        logits: ``[B, T, V]``, or the last ``logits_to_keep`` positions, in the model's dtype.
        ce_loss: mean next-token cross-entropy in nats; with labels only.
        load_balance_loss: ``[L]``, unweighted, each 1 at perfect balance.
        router_z_loss: ``[L]``, unweighted.
        router_stats: see :class:`RouterStats`.
        past_key_values: the cache, when used.
        hidden_states: residual stream before each layer and after the final norm, ``L + 1`` times
            ``[B, T, D]``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    ce_loss: Tensor | None = None
    load_balance_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    router_stats: RouterStats | None = None


class LayerOutput(NamedTuple):
    """One layer's output and what its router did."""

    x_BTD: Tensor
    mean_scores_E: Tensor
    z_loss: Tensor
    counts_E: Tensor
    active_E: Tensor
    experts_TK: Tensor


class SparseMoe(nn.Module):
    """Router and experts of a layer, under the official names."""

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.primary_router = Router(config)
        self.experts = Experts(config)


class SmallThinkerDecoderLayer(GradientCheckpointingLayer):
    """One layer. The router runs first, on the raw residual stream."""

    def __init__(self, config: SmallThinkerConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.block_sparse_moe = SparseMoe(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: LayerMask,
        valid_T: Tensor | None,
        past_key_values: Cache | None = None,
        routed_BTD: Tensor | None = None,
        choice_bias_E: Tensor | None = None,
    ) -> LayerOutput:
        """``[B, T, D]`` in, ``[B, T, D]`` and the router's figures out; the router reads ``routed_BTD`` if given."""
        moe = self.block_sparse_moe
        valid_T = None if torch.compiler.is_exporting() else valid_T
        source_BTD = x_BTD if routed_BTD is None else routed_BTD
        routing = moe.primary_router(source_BTD.flatten(0, 1), choice_bias_E)
        y_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask, past_key_values)
        m_TD = self.post_attention_layernorm(y_BTD).flatten(0, 1)
        out_TD, active_E = moe.experts(m_TD, routing.weights_TK, routing.experts_TK, valid_T)
        scores_TE = router_scores(routing.logits_TE, moe.primary_router.softmax)
        return LayerOutput(
            y_BTD + out_TD.view_as(y_BTD),
            masked_mean(scores_TE, valid_T),
            router_z(routing.logits_TE, valid_T),
            count_experts(routing.experts_TK, moe.experts.num_experts, valid_T),
            active_E,
            routing.experts_TK,
        )


class SmallThinkerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family."""

    config_class = SmallThinkerConfig
    config: SmallThinkerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SmallThinkerDecoderLayer"]  # noqa: RUF012  # transformers declares an instance variable
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """normal(0, initializer_range) for every matrix, 1 for norms; no depth scaling (the released code)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)


class SmallThinkerModel(SmallThinkerPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SmallThinkerDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.balance = LoadBalance()
        self.attention_backend: AttentionBackend = "auto"
        self.choice_bias_LE: Tensor | None = None
        self._record_experts = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = cast(nn.Embedding, value)

    def _masks(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        cache: Cache | None,
    ) -> dict[bool, LayerMask]:
        """The mask of global (False) and of windowed (True) layers, as far as they exist."""
        assert self.config.sliding_window_layout is not None
        queries = x_BTD.shape[1]
        padding_BS = None if attention_mask is None else attention_mask.bool()
        if padding_BS is not None and not torch.compiler.is_compiling() and bool(padding_BS.all()):
            padding_BS = None
        masks = {}
        backend = self.attention_backend
        use_blocks = backend == "flex" or (backend == "auto" and takes_kernels(x_BTD))
        for windowed in (False, True):
            if windowed not in self.config.sliding_window_layout:
                continue
            layer = self.config.sliding_window_layout.index(int(windowed))
            keys, key_offset, past = queries, 0, 0
            if cache is not None:
                past = cache.get_seq_length(layer)
                keys, key_offset = cache.get_mask_sizes(queries, layer)
            masks[windowed] = build_layer_mask(
                queries=queries,
                keys=keys,
                key_offset=key_offset,
                past_tokens=past,
                window=self.config.sliding_window_size if windowed else None,
                padding_BS=padding_BS,
                documents_BT=document_ids,
                device=x_BTD.device,
                use_blocks=use_blocks,
            )
        return masks

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        padded: bool | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> ModelOutputWithStats:
        """Run the layers; arguments as in :meth:`SmallThinkerForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        x_BTD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = x_BTD.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cache = past_key_values
        past = 0 if cache is None else cache.get_seq_length()
        if document_ids is not None and (attention_mask is not None or cache is not None):
            raise ValueError(
                "document_ids cannot be combined with attention_mask or a cache; mark padding by a negative id."
            )
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=x_BTD.device) + past)[None]
        valid_T = None
        if document_ids is not None:
            if padded is None:  # on a GPU this synchronises
                padded = not torch.compiler.is_compiling() and bool((document_ids < 0).any())
            if padded:
                valid_T = (document_ids >= 0).flatten()
        elif attention_mask is not None and attention_mask.dim() == 2:
            real_BT = attention_mask[:, past : past + tokens].bool()
            if torch.compiler.is_compiling() or not bool(real_BT.all()):
                valid_T = real_BT.flatten()

        masks = self._masks(x_BTD, attention_mask, document_ids, cache)
        cos, sin = self.rotary_emb(position_ids, x_BTD.dtype)
        hidden_states = []
        outputs = []
        entering: deque[Tensor] = deque(maxlen=self.config.router_lead + 1)  # of this layer and those before
        biases: Iterable[Tensor | None] = (None,) * len(self.layers)
        if self.training and self.choice_bias_LE is not None:
            biases = self.choice_bias_LE
        for module, bias_E in zip(self.layers, biases, strict=True):
            layer = cast(SmallThinkerDecoderLayer, module)
            entering.append(x_BTD)
            if output_hidden_states:
                hidden_states.append(x_BTD)
            output = layer(
                x_BTD,
                cos,
                sin,
                masks[layer.self_attn.is_windowed],
                valid_T,
                past_key_values=cache,
                routed_BTD=entering[0],
                choice_bias_E=bias_E,
            )
            output = LayerOutput(*output)
            x_BTD = output.x_BTD
            # Without the stream: where no gradient is wanted, every layer's would be held for nothing.
            outputs.append(output._replace(x_BTD=cast(Tensor, None)))
        x_BTD = self.norm(x_BTD)
        if output_hidden_states:
            hidden_states.append(x_BTD)
        if torch.compiler.is_exporting():  # a graph for inference: no statistics, no losses
            return ModelOutputWithStats(last_hidden_state=x_BTD, past_key_values=cache)

        counts_LE = torch.stack([output.counts_E for output in outputs])
        active_LE = torch.stack([output.active_E for output in outputs])
        # torch.tensor would be a synchronising copy from the host.
        valid = torch.full((), batch * tokens, device=x_BTD.device) if valid_T is None else valid_T.sum()
        frequencies_LE = self.balance.frequencies(counts_LE, valid, self.training)
        mean_scores_LE = torch.stack([output.mean_scores_E for output in outputs])
        experts = None
        if self._record_experts:
            experts = torch.stack([output.experts_TK for output in outputs]).unflatten(1, (batch, tokens))
        return ModelOutputWithStats(
            last_hidden_state=x_BTD,
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            load_balance_loss=load_balance_loss(frequencies_LE, mean_scores_LE),
            router_z_loss=torch.stack([output.z_loss for output in outputs]),
            router_stats=RouterStats(
                expert_counts=counts_LE,
                active_neurons=active_LE.sum(dim=1),
                active_neurons_by_expert=active_LE,
                mean_scores=mean_scores_LE.detach(),
                tokens=batch * tokens if valid_T is None else int(valid),
                experts=experts,
            ),
        )


class SmallThinkerForCausalLM(SmallThinkerPreTrainedModel, GenerationMixin):
    """SmallThinker with its output matrix and losses."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__(config)
        self.model = SmallThinkerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def balance(self) -> LoadBalance:
        """The load-balance counts; call ``balance.reset()`` after each optimizer step."""
        balance: LoadBalance = self.model.balance
        return balance

    @balance.setter
    def balance(self, value: LoadBalance) -> None:
        self.model.balance = value

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the output matrix when the config says so; on loading, the embedding wins over a stored one."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        loading_both = missing_keys is not None and not {head, embedding} & missing_keys
        if loading_both and self.config.tie_word_embeddings:
            assert missing_keys is not None
            if not torch.equal(self.lm_head.weight, self.model.embed_tokens.weight):
                warn_untied(self.config.name_or_path or "The checkpoint")
            missing_keys.add(head)  # else transformers leaves the two untied when they differ
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        read: Callable[[OfficialTensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the official layout: ``config.json``, ``generation_config.json`` and safetensors.

        Unlike the inherited method it unstacks one file's experts at a time, and writes ``lm_head.weight``
        of a tied model too, as the release does.

        Args:
            save_directory: created if needed.
            is_main_process: False writes nothing.
            state_dict: parameters under their names in memory, instead of the model's own.
            push_to_hub: not supported.
            max_shard_size: largest file, in bytes or as ``"5GB"``.
            read: returns an official tensor, asked for one at a time in the order of the layout, instead of the
                model's own parameters (which may then lie on the meta device); the files' dtype is the config's.
            **kwargs: other arguments of the inherited method, which do not apply here.
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not supported; upload the folder with a tool of your choice.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if read is None:
            parameters = self.state_dict() if state_dict is None else state_dict
            self.config.dtype = parameters["model.norm.weight"].dtype
            tied = {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

            def read(entry: OfficialTensor) -> Tensor:
                return entry.view(parameters[tied.get(entry.parameter, entry.parameter)])

        self.config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        assert isinstance(self.config.dtype, torch.dtype)
        write_checkpoint(
            folder, self.config, read, self.config.dtype, max_shard_bytes=parse_size(max_shard_size)
        )

    def set_attention_backend(self, backend: AttentionBackend) -> None:
        """Choose how packed documents attend: ``flex`` (block masks), ``sdpa`` (masks in memory), ``auto``."""
        self.model.attention_backend = backend

    def set_expert_backend(self, backend: Backend) -> None:
        """Choose how experts are computed: ``loop``, ``grouped`` (grouped_mm), ``dense``, or ``auto``."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.backend = backend

    def set_router_fp32(self, wanted: bool) -> None:
        """Compute router logits in float32, whatever the model's dtype."""
        for module in self.modules():
            if isinstance(module, Router):
                module.in_fp32 = wanted

    def set_choice_bias(self, bias_LE: Tensor | None) -> None:
        """In training mode, choose experts with these biases; see ``Router.forward`` of ``model.experts``."""
        self.model.choice_bias_LE = bias_LE

    @contextmanager
    def record_experts(self) -> Iterator[None]:
        """Within, ``output.router_stats.experts`` holds every token's chosen experts, ``[L, B, T, K]``."""
        self.model._record_experts = True
        try:
            yield
        finally:
            self.model._record_experts = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        padded: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits, and losses when labels are given.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, past + T]``, 1 for tokens and 0 for padding on either side.
            position_ids: ``[B or 1, T]`` RoPE positions; default: the slots after the past.
            past_key_values: cache of earlier tokens; grows in place, at most the window in windowed layers.
            inputs_embeds: ``[B, T, D]`` instead of ``input_ids``.
            labels: ``[B, T]``, unshifted; -100 is ignored.
            document_ids: ``[B, T]``; tokens attend only within their document, and a document's first token
                is no label. Negative: padding. Not together with ``attention_mask`` or a cache.
            padded: whether ``document_ids`` holds padding; ``None``: look, which synchronises with the GPU.
            use_cache: return a cache. Default: the config's, except in training or with labels or documents.
            logits_to_keep: compute logits for this many last positions (0: all) or for these positions.
            output_hidden_states: return the residual stream before every layer.
        """
        if use_cache is None:
            fresh = past_key_values is None and (
                self.training or labels is not None or document_ids is not None
            )
            use_cache = self.config.use_cache and not fresh
        outputs: ModelOutputWithStats = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            padded=padded,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        x_BTD = outputs.last_hidden_state
        assert x_BTD is not None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(x_BTD[:, keep])
        loss = ce_loss = None
        if labels is not None:
            if logits_BTV.shape[1] != x_BTD.shape[1]:
                raise ValueError("labels need the logits of all positions; leave logits_to_keep at 0.")
            ce_loss = next_token_loss(logits_BTV, labels, document_ids)
            assert outputs.load_balance_loss is not None and outputs.router_z_loss is not None
            loss = (
                ce_loss
                + self.config.load_balance_coef * outputs.load_balance_loss.sum()
                + self.config.router_z_coef * outputs.router_z_loss.sum()
            )
        return CausalLMOutput(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            ce_loss=ce_loss,
            load_balance_loss=outputs.load_balance_loss,
            router_z_loss=outputs.router_z_loss,
            router_stats=outputs.router_stats,
        )
