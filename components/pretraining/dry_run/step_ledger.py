"""What a step allocates, moves and multiplies, operator by operator: ``with StepLedger(989e12, 3.35e12) as ledger``.

Runs over fake tensors and adds up what each operator would cost on a GPU: the memory of live storages and its peak,
FLOPs, bytes read and written, and from both the least time it could take. Caches are not counted, nor kernels' own
scratch memory, nor launches: an estimate, not a measurement.

Parts are told apart as in :mod:`components.pretraining.studies.profiling`: forward operators by the module they ran in,
backward operators by the forward operator that created them.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import gc
import traceback
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from components.pretraining.training.step_parts import PREFIX

if TYPE_CHECKING:
    from model import SmallThinkerForCausalLM

_ALLOCATION_BYTES = 512  # CUDA's allocator rounds up to these
_aten, _higher = torch.ops.aten, torch.ops.higher_order
_FREE = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "set_",
    "_local_scalar_dense",
} | {"_unsafe_view", "_reshape_alias", "lift_fresh", "alias"}
# Of their first tensor these read only as much as they write.
_GATHERS = {"index_select", "gather", "embedding", "index"}
# They touch of their target only what they are given.
_SCATTERS = {"index_add_", "scatter_add_", "index_copy_", "index_add", "scatter_add", "index_put_"}
_OVERWRITES = {"copy_", "zero_", "fill_"}


@dataclass(frozen=True)
class Cost:
    """What operators cost.

    Attributes:
        flops: of matrix products and attention (2 per multiply-add).
        moved_bytes: read and written.
        bound_s: the sum over operators of max(flops / peak, bytes / bandwidth).
        kernels: operators that run something.
    """

    flops: float = 0.0
    moved_bytes: float = 0.0
    bound_s: float = 0.0
    kernels: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.moved_bytes + other.moved_bytes,
            self.bound_s + other.bound_s,
            self.kernels + other.kernels,
        )


@dataclass(frozen=True)
class _Allocation:
    """A live storage: its size, what it holds, who made it."""

    size_bytes: int
    kind: str
    part: str


@dataclass
class Peak:
    """The moment of most live memory.

    Attributes:
        live_bytes: then.
        by_kind: of it, by kind: ``weights`` and what else was labelled, else the phase that allocated it.
        by_part: of what was not labelled, by the part that allocated it.
        at: part and phase that were running.
    """

    live_bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    by_part: dict[str, int] = field(default_factory=dict)
    at: str = ""


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments, each once."""
    found = {id(leaf): leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)}
    return list(found.values())


def extent_bytes(tensor: Tensor) -> int:
    """Bytes that reading ``tensor`` touches: an expanded dimension is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= int(size) if stride or not size else 1
    return count * tensor.element_size()


def _causal_pairs(tokens: int, window: int | None) -> float:
    """Pairs of query and key in one causal sequence, at most ``window`` keys for each query."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window


def operator_flops(name: str, args: Sequence[Any], window: int | None) -> float:
    """FLOPs of one operator; 0 for all but matrix products and attention.

    Attention counts causal pairs within the window and not the cut between documents: forward two products, backward
    five (the scores are computed again).
    """
    if name in ("mm", "bmm", "_grouped_mm"):
        return 2.0 * float(args[0].numel() * args[1].shape[-1])
    if name in ("addmm", "addmm_", "baddbmm"):
        return 2.0 * float(args[1].numel() * args[2].shape[-1])
    if name in ("flex_attention", "flex_attention_backward"):
        batch, heads, tokens, head_dim = args[0].shape
        products = 2 if name == "flex_attention" else 5
        return 2.0 * products * float(batch * heads * head_dim) * _causal_pairs(int(tokens), window)
    return 0.0


def operator_bytes(name: str, args: Any, kwargs: Any, out: Any) -> float:
    """Bytes that one operator reads and writes."""
    results, inputs = tensors_in(out), tensors_in((args, kwargs))
    if name in _FREE:
        return 0.0
    if name in ("flex_attention", "flex_attention_backward"):
        inputs = tensors_in(args[:3] if name == "flex_attention" else args[:6])
        return float(sum(map(extent_bytes, [*inputs, *results])))
    written = sum(map(extent_bytes, results))
    if name in _GATHERS:
        return float(2 * written + sum(map(extent_bytes, inputs[1:])))
    if name in _SCATTERS:
        touched = extent_bytes(inputs[-1])
        return float(2 * touched + sum(map(extent_bytes, inputs[1:])))
    if name in _OVERWRITES:
        return float(written + sum(map(extent_bytes, inputs[1:])))
    if not results and inputs:  # _foreach and _fused operators update their arguments
        written = sum(map(extent_bytes, inputs))
    return float(written + sum(map(extent_bytes, inputs)))


class StepLedger(TorchDispatchMode):
    """Adds up what operators on ``device_type`` cost; enter it within ``FakeTensorMode``.

    Args:
        peak_flops: of the GPU per second, dense, in the working dtype.
        bandwidth: of its memory in bytes per second.
        device_type: what is counted; tests count ``cpu``.
    """

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo traces below it: captured graphs are counted by ``fused_regions``."""
        return True

    def __init__(self, peak_flops: float, bandwidth: float, device_type: str = "cuda") -> None:
        super().__init__()
        self._peak_flops, self._bandwidth, self._device_type = peak_flops, bandwidth, device_type
        self.phase = "forward"
        self.costs: dict[tuple[str, str, str], Cost] = defaultdict(Cost)  # part, phase, operator
        self.waits: dict[str, int] = defaultdict(int)
        self.graphs = 0  # captured by torch.compile
        self.peak = Peak()
        self.part_peaks: dict[str, int] = defaultdict(int)
        self._live: dict[int, _Allocation] = {}
        self._live_bytes = 0
        self._parts: list[str] = []
        self._window: int | None = None
        self._backward_phase = "recomputation"
        self._owners: dict[int, tuple[str, int | None]] = {}
        self._sequence = torch._C._autograd._get_sequence_nr()
        self._suspended = False
        self._handles: list[Any] = []

    # --- what is running -------------------------------------------------------------------------------------------

    def watch(self, model: SmallThinkerForCausalLM) -> None:
        """Attribute costs to the modules of ``model``. Call it after compiling, or the hooks would be compiled too."""
        from model.attention import Attention
        from model.experts import Experts, Router
        from model.modeling import SmallThinkerDecoderLayer

        labels = {Attention: "attention", Router: "router and dispatch", Experts: "router and dispatch"}
        for module in model.modules():
            label = labels.get(type(module))
            if label is not None and module._compiled_call_impl is None:
                self._handles.append(module.register_forward_pre_hook(self._enter(label)))
                # Checkpointing ends a recomputation by an exception.
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))
            if isinstance(module, SmallThinkerDecoderLayer):
                windowed = module.self_attn.is_windowed
                window = model.config.sliding_window_size if windowed else None
                first = module.block_sparse_moe.primary_router  # runs before attention
                self._handles.append(first.register_forward_pre_hook(self._enter_layer(window), prepend=True))

    def _enter(self, label: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._parts.append(label)

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._parts.pop()

    def _enter_layer(self, window: int | None) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._window = window

        return hook

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def running(self) -> tuple[str, str, int | None]:
        """Part, phase and attention window of what runs now."""
        node = torch._C._current_autograd_node()
        part = self._parts[-1] if self._parts else "rest"
        if node is None:
            now = torch._C._autograd._get_sequence_nr()
            for number in range(self._sequence, now):
                self._owners.setdefault(number, (part, self._window))
            self._sequence = now
            return part, self.phase, self._window
        if self._parts:
            return part, self._backward_phase, self._window
        owner, window = self._owners.get(node._sequence_nr(), ("rest", None))
        return owner, "backward", window

    @contextmanager
    def within(self, part: str, backward_phase: str = "recomputation") -> Iterator[None]:
        """What runs within counts as ``part``; in a backward pass, as ``backward_phase`` of it."""
        before, self._backward_phase = self._backward_phase, backward_phase
        self._parts.append(part)
        try:
            yield
        finally:
            self._parts.pop()
            self._backward_phase = before

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """What runs within costs nothing, and its results are not allocated: a fused kernel keeps them in registers."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    # --- memory -----------------------------------------------------------------------------------------------------

    @property
    def live_bytes(self) -> int:
        """Memory of everything alive now."""
        return self._live_bytes

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of ``tensors`` as ``kind``, whether they were seen before or not."""
        for tensor in tensors:
            key = self._track(tensor, "labelled", kind)
            if key is not None:
                self._live[key] = _Allocation(self._live[key].size_bytes, kind, "labelled")

    def _track(self, tensor: Tensor, part: str, kind: str) -> int | None:
        if tensor.device.type != self._device_type:
            return None
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self._live:
            rounded = -(-int(storage.nbytes()) // _ALLOCATION_BYTES) * _ALLOCATION_BYTES
            self._live[key] = _Allocation(rounded, kind, part)
            self._live_bytes += rounded
            weakref.finalize(storage, self._free, key)
        return key

    def _free(self, key: int) -> None:
        self._live_bytes -= self._live.pop(key).size_bytes

    def allocated(self, results: Iterable[Tensor]) -> None:
        """Count ``results`` as allocated by what runs now."""
        part, phase, _ = self.running()
        for tensor in results:
            self._track(tensor, part, phase)
        self.part_peaks[part] = max(self.part_peaks[part], self._live_bytes)
        if self._live_bytes > self.peak.live_bytes:
            kinds: dict[str, int] = defaultdict(int)
            parts: dict[str, int] = defaultdict(int)
            for allocation in self._live.values():
                kinds[allocation.kind] += allocation.size_bytes
                if allocation.part != "labelled":
                    parts[f"{allocation.part}, {allocation.kind}"] += allocation.size_bytes
            self.peak = Peak(self._live_bytes, dict(kinds), dict(parts), f"{part}, {phase}")

    # --- operators --------------------------------------------------------------------------------------------------

    def charge(self, name: str, flops: float, moved_bytes: float) -> None:
        """Add one kernel to the cost of what runs now."""
        part, phase, _ = self.running()
        if part == "router and dispatch" and name == "_grouped_mm":
            part = "expert products"
        bound_s = max(flops / self._peak_flops, moved_bytes / self._bandwidth)
        self.costs[part, phase, name] += Cost(flops, moved_bytes, bound_s, 1)

    def _note_synchronisation(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """List a synchronising copy between host and device."""
        if name not in ("_to_copy", "copy_"):
            return
        source = args[1] if name == "copy_" else args[0]
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        from_host = source.device.type == "cpu"
        if from_host == (out.device.type == "cpu") or not (blocking or not from_host):
            return
        frames = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
        here = [frame for frame in frames if not frame.filename.endswith("step_ledger.py")][-1]
        self.waits[f"{here.filename.rpartition('/')[2]}:{here.lineno} {here.line}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        name = packet.__name__ if packet is not None else func.name()
        if name.startswith("_record_function"):
            return self._record(name, func, args, kwargs)
        compiling = torch._guards.TracingContext.try_get() is not None
        if self._suspended or compiling or (packet is not None and func.namespace == "prim"):
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        results = tensors_in(out)
        if not any(t.device.type == self._device_type for t in results or tensors_in((args, kwargs))):
            return out
        self._note_synchronisation(name, args, kwargs, out)
        moved_bytes = 0.0 if packet is not None and func.is_view else operator_bytes(name, args, kwargs, out)
        window = self.running()[2]
        if moved_bytes:
            self.charge(name, operator_flops(name, args, window), moved_bytes)
        self.allocated(results)
        return out

    def _record(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """``components.pretraining.training.step_parts.part`` around what follows, or its end."""
        if "enter" in name:
            label = args[0]
            outer = self._parts[-1] if self._parts else "rest"
            self._parts.append(label.removeprefix(PREFIX) if label.startswith(PREFIX) else outer)
        elif self._parts:
            self._parts.pop()
        with no_dispatch():
            return func(*args, **kwargs)

    # --- results ----------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Forget costs, waits and peaks; what is alive stays."""
        gc.collect()
        self.costs.clear()
        self.waits.clear()
        self.part_peaks.clear()
        self.peak = Peak()

    def total(self, part: str | None = None) -> Cost:
        """The cost of a part, or of everything."""
        chosen = [cost for key, cost in self.costs.items() if part is None or key[0] == part]
        return sum(chosen, Cost())
