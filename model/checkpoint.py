"""Checkpoints in the official layout: one tensor per expert and projection in files, stacked experts in
memory.

``for name, tensor in OfficialCheckpoint(folder).stacked(): ...`` converts a checkpoint of any size while
holding one stacked tensor at a time (1.5 GiB for the widest tensor of the 21B in float32).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.configuration import SmallThinkerConfig

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class CheckpointError(Exception):
    """A checkpoint folder is incomplete, torn or does not fit its configuration."""


@dataclass(frozen=True)
class OfficialTensor:
    """One tensor of the official layout and its place in memory.

    Attributes:
        name: official name.
        shape: official shape.
        parameter: name of the parameter in memory that holds it.
        expert: index into that parameter's first axis; ``None`` when the tensor is the whole parameter.
        rows: rows of that expert's matrix; ``None`` for all.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    expert: int | None = None
    rows: slice | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """This tensor's part of the parameter in memory."""
        if self.expert is None:
            return parameter
        matrix = parameter[self.expert]
        return matrix if self.rows is None else matrix[self.rows]


def official_layout(config: SmallThinkerConfig) -> Iterator[OfficialTensor]:
    """Every tensor of the official files, in the order in which they are written.

    A tied model's files carry ``lm_head.weight`` as well, as the released 4B does.
    """
    width, vocab = config.hidden_size, config.vocab_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    experts, hidden = config.moe_num_primary_experts, config.moe_ffn_hidden_size
    yield OfficialTensor(_EMBEDDING, (vocab, width), _EMBEDDING)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        moe = f"{prefix}block_sparse_moe."
        plain = {
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}self_attn.q_proj.weight": (query, width),
            f"{prefix}self_attn.k_proj.weight": (key, width),
            f"{prefix}self_attn.v_proj.weight": (key, width),
            f"{prefix}self_attn.o_proj.weight": (width, query),
            f"{prefix}post_attention_layernorm.weight": (width,),
            f"{moe}primary_router.weight": (experts, width),
        }
        for name, shape in plain.items():
            yield OfficialTensor(name, shape, name)
        for e in range(experts):
            expert = f"{moe}experts.{e}."
            gate_up, down = f"{moe}experts.gate_up_proj", f"{moe}experts.down_proj"
            yield OfficialTensor(f"{expert}gate.weight", (hidden, width), gate_up, e, slice(0, hidden))
            yield OfficialTensor(f"{expert}up.weight", (hidden, width), gate_up, e, slice(hidden, 2 * hidden))
            yield OfficialTensor(f"{expert}down.weight", (width, hidden), down, e)
    yield OfficialTensor("model.norm.weight", (width,), "model.norm.weight")
    yield OfficialTensor(_HEAD, (vocab, width), _HEAD)


def parameter_shapes(config: SmallThinkerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in memory, in order; a tied model has no ``lm_head.weight``."""
    shapes: dict[str, tuple[int, ...]] = {}
    experts, hidden = config.moe_num_primary_experts, config.moe_ffn_hidden_size
    for entry in official_layout(config):
        if entry.expert is None:
            shapes[entry.parameter] = entry.shape
        elif entry.parameter.endswith("gate_up_proj"):
            shapes[entry.parameter] = (experts, 2 * hidden, config.hidden_size)
        else:
            shapes[entry.parameter] = (experts, config.hidden_size, hidden)
    if config.tie_word_embeddings:
        del shapes[_HEAD]
    return shapes


class OfficialCheckpoint:
    """A folder of sharded or single safetensors under official names, read one tensor at a time.

    Only one file is mapped at any moment, and it is unmapped before the next is opened, so the memory in
    use is that of the tensors handed out plus one file's pages, which the system may drop.
    """

    def __init__(self, folder: Path | str, config: SmallThinkerConfig | None = None) -> None:
        """Read the index and check it against the configuration.

        Raises:
            CheckpointError: files or tensors are missing, unknown, or of a wrong shape.
        """
        self.folder = Path(folder)
        if config is None:
            if not (self.folder / "config.json").is_file():
                raise CheckpointError(f"{self.folder} holds no config.json.")
            config = SmallThinkerConfig.from_pretrained(self.folder)
        self.config = config
        self._open_name: str | None = None
        self._open_file: Any = None
        self.files = self._index()
        self._check()

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX_NAME
        if index.is_file():
            try:
                files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{index} is not a valid index: {error}.") from error
            return files
        if (self.folder / SINGLE_NAME).is_file():
            return dict.fromkeys(self._file(SINGLE_NAME).keys(), SINGLE_NAME)
        raise CheckpointError(f"{self.folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}.")

    def _file(self, name: str) -> Any:
        if name != self._open_name:
            self._open_file = None  # unmap before mapping the next
            try:
                self._open_file = safe_open(self.folder / name, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(f"{self.folder / name} is missing.") from error
            except SafetensorError as error:
                raise CheckpointError(
                    f"{self.folder / name} is torn or not a safetensors file: {error}."
                ) from error
            self._open_name = name
        return self._open_file

    def _check(self) -> None:
        shapes = {entry.name: entry.shape for entry in official_layout(self.config)}
        optional = {_HEAD} if self.config.tie_word_embeddings else set()
        missing = shapes.keys() - self.files.keys() - optional
        unknown = {
            name for name in self.files if name not in shapes and not name.endswith("rotary_emb.inv_freq")
        }
        for label, names in (("lacks", missing), ("holds the unknown", unknown)):
            if names:
                raise CheckpointError(
                    f"{self.folder} {label} {_some(names)}; its config.json asks otherwise."
                )
        for name in sorted(self.files, key=lambda name: self.files[name]):
            if name not in shapes:
                continue
            try:
                found = tuple(self._file(self.files[name]).get_slice(name).get_shape())
            except SafetensorError as error:
                raise CheckpointError(f"{self.folder / self.files[name]} lacks {name}.") from error
            if found != shapes[name]:
                raise CheckpointError(f"{name} has shape {found}; the configuration asks for {shapes[name]}.")

    def read(self, name: str) -> Tensor:
        """One tensor by its official name, in the file's dtype.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.folder} holds no tensor {name}.")
        tensor: Tensor = self._file(self.files[name]).get_tensor(name)
        return tensor

    def read_entry(self, entry: OfficialTensor) -> Tensor:
        """A tensor of the layout; a tied model's output matrix is its embedding, whatever the file holds."""
        tied = self.config.tie_word_embeddings and entry.name == _HEAD
        return self.read(_EMBEDDING if tied else entry.name)

    def stacked(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The parameters as they lie in memory, one at a time; ``dtype`` converts.

        A tied model's ``lm_head.weight`` is compared with the embedding, not handed out; see
        :meth:`check_tied`.
        """
        if self.config.tie_word_embeddings:
            self.check_tied()
        parts: dict[str, list[OfficialTensor]] = {}
        for entry in official_layout(self.config):
            parts.setdefault(entry.parameter, []).append(entry)
        for parameter, shape in parameter_shapes(self.config).items():
            first = self.read(parts[parameter][0].name)
            stack = torch.empty(shape, dtype=dtype or first.dtype)
            for entry in parts[parameter]:
                entry.view(stack).copy_(self.read(entry.name))
            del first
            yield parameter, stack

    def check_tied(self) -> None:
        """Warn when a tied model's file carries an output matrix that differs from the embedding.

        The released 4B carries one. The embedding wins, as in the official implementation.
        """
        if _HEAD not in self.files:
            return
        rows = 8192
        vocab = self.config.vocab_size
        for start in range(0, vocab, rows):
            stop = min(start + rows, vocab)
            head, embedding = (
                self._file(self.files[name]).get_slice(name)[start:stop] for name in (_HEAD, _EMBEDDING)
            )
            if not torch.equal(head, embedding):
                warn_untied(str(self.folder))
                return

    def fill(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Load into a model on the meta device or an allocated one, one stacked tensor at a time.

        Args:
            model: a ``SmallThinkerForCausalLM``. Meta parameters are replaced by CPU ones; others are
                written in place, on their device and in their dtype.
            dtype: dtype of parameters created for meta ones; default: the model's.
        """
        targets = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in self.stacked():
            target = targets[name]
            with torch.no_grad():
                if target.is_meta:
                    parent, _, leaf = name.rpartition(".")
                    value = nn.Parameter(tensor.to(dtype or target.dtype), requires_grad=target.requires_grad)
                    setattr(model.get_submodule(parent), leaf, value)
                else:
                    target.copy_(tensor)
        tie: Callable[[], None] = model.tie_weights  # type: ignore[assignment]
        tie()


def warn_untied(source: str) -> None:
    """Say that a tied model's output matrix differs from its embedding and is not used."""
    logger.warning(
        "%s ties its output matrix to the embedding but carries a different lm_head.weight; the embedding is used.",
        source,
    )


def write_checkpoint(
    folder: Path | str,
    config: SmallThinkerConfig,
    read: Callable[[OfficialTensor], Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write safetensors under the official names, one shard in memory at a time.

    Args:
        folder: created if needed; files of an earlier save are replaced. ``config.json`` is the caller's.
        config: gives the layout.
        read: returns an official tensor; it is asked in the order of :func:`.official_layout`.
        dtype: dtype of the files.
        max_shard_bytes: upper size of a file, unless one tensor is larger.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[OfficialTensor]] = [[]]
    filled = total_bytes = 0
    for entry in official_layout(config):
        size = dtype.itemsize * math.prod(entry.shape)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
        total_bytes += size
    weight_map: dict[str, str] = {}
    names = []
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # copy: safetensors refuses tensors that share memory, and some of these are slices of one stack
        tensors = {
            entry.name: read(entry).detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
            for entry in shard
        }
        weight_map.update(dict.fromkeys(tensors, name))
        partial = folder / f".{name}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # save_file leaves it readable by its owner only
        partial.replace(folder / name)
        names.append(name)
        del tensors
    index = folder / INDEX_NAME
    if len(shards) == 1:
        index.unlink(missing_ok=True)
    else:
        contents = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        partial = folder / f".{INDEX_NAME}.partial"
        partial.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")
        partial.replace(index)
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in names and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", stale.name):
            stale.unlink()


def parse_size(size: int | str) -> int:
    """Bytes from ``5000`` or ``"5GB"`` (10^9) or ``"5GiB"`` (2^30).

    Raises:
        CheckpointError: the text is not a size.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].upper() not in _SIZE_UNITS:
        raise CheckpointError(f"{size!r} is not a size; write a number of bytes or for example '5GB'.")
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
