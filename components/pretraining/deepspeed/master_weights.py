"""The optimizer's fp32 weights on the first rank, one tensor at a time: ``MasterWeights(...).read(entry)``.

ZeRO partitions a parameter's master weights over the ranks that hold it, and expert parallelism the experts over
ranks. One all-gather says which rank holds which pieces; from then on a tensor costs its bytes sent to the first rank,
and no rank ever holds more of the model than before, beside that one tensor.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from components.pretraining.deepspeed.parameter_names import official_parameter
from components.pretraining.processes.ranks import Ranks
from model import SmallThinkerConfig, SmallThinkerForCausalLM
from model.checkpoint import OfficialTensor, official_layout

_EMBEDDING = "model.embed_tokens.weight"


class MasterWeights:
    """Both creating it and :meth:`read` are collectives: all ranks read the same tensors in the same order.

    Args:
        engine: the DeepSpeed engine.
        ranks: this process's place.
        dtype: dtype of what is read, rounded once from fp32.
    """

    def __init__(self, engine: Any, ranks: Ranks, dtype: torch.dtype) -> None:
        self._ranks, self._dtype = ranks, dtype
        self._config = engine.module.config
        self._pieces: dict[str, Tensor] = {}
        held: dict[str, tuple[int, int]] = {}
        local = ranks.local_experts(self._config.moe_num_primary_experts)
        for name, parameter in engine.module.named_parameters():
            official, mapping = official_parameter(name), parameter._hp_mapping
            if official is None or mapping is None:
                continue
            start = mapping.lp_fragment_address.start
            if official != name:
                start += local.start * math.prod(parameter.shape[1:])
            self._pieces[official] = mapping.hp_fragment
            held[official] = (start, mapping.hp_fragment.numel())
        # Per rank and parameter: first element (of all experts' stack) and number of elements.
        self._held: list[dict[str, tuple[int, int]]] = [held]
        self._group = None
        if ranks.world > 1:
            # Gloo moves host memory; NCCL would allocate GPU buffers for a channel from the first rank to every other.
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
            self._held = [{} for _ in range(ranks.world)]
            dist.all_gather_object(self._held, held, group=self._group)

    def read(self, entry: OfficialTensor) -> Tensor:
        """A tensor of the official layout: on the first rank on the CPU, on the others an empty one."""
        tied = self._config.tie_word_embeddings and entry.name == "lm_head.weight"
        name = _EMBEDDING if tied else entry.parameter
        size = math.prod(entry.shape)
        begin = 0
        if entry.expert is not None:
            per_expert, above = self._in_stack(entry)
            begin = entry.expert * per_expert + above
        out = torch.empty(size if self._ranks.is_first else 0, dtype=self._dtype)
        filled = 0
        for rank, held in enumerate(self._held):
            start, count = held.get(name, (0, 0))
            first, last = max(begin, start), min(begin + size, start + count)
            if first >= last:
                continue
            filled += last - first
            if rank == self._ranks.rank:
                piece = self._pieces[name].view(-1)[first - start : last - start].detach()
                piece = piece.to("cpu", self._dtype)
                if rank > 0:
                    dist.send(piece, dst=0, group=self._group)
                else:
                    out[first - begin : last - begin] = piece
            elif self._ranks.is_first:
                dist.recv(out[first - begin : last - begin], src=rank, group=self._group)
        assert filled == size, f"the ranks hold {filled} of the {size} elements of {entry.name}"
        return out.view(entry.shape) if self._ranks.is_first else out

    def _in_stack(self, entry: OfficialTensor) -> tuple[int, int]:
        """Elements of one expert in the stack that holds ``entry``, and those of them that lie before it."""
        if entry.rows is None:
            return math.prod(entry.shape), 0
        width = self._config.hidden_size
        return 2 * self._config.moe_ffn_hidden_size * width, entry.rows.start * width

    def take_part(self, architecture: SmallThinkerConfig) -> None:
        """The other ranks' side of :func:`export_model`: read every tensor in order, as the first rank does."""
        for entry in official_layout(architecture):
            self.read(entry)


def export_model(
    weights: MasterWeights,
    architecture: SmallThinkerConfig,
    dtype: torch.dtype,
    folder: Path,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face folder on the first rank, while the others :meth:`MasterWeights.take_part`.

    The host holds one file's tensors, at most ``max_shard_bytes``.
    """
    architecture = copy.deepcopy(architecture)
    architecture.dtype = dtype
    with torch.device("meta"):
        model = SmallThinkerForCausalLM(architecture)
    model.save_pretrained(folder, read=weights.read, max_shard_size=max_shard_bytes)
