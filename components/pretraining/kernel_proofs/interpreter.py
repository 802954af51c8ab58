"""The GPU's kernels on CPU tensors: ``with interpreted_kernels(): ...``, in a process with ``TRITON_INTERPRET=1``.

Within, what the CUDA path compiles is compiled for a GPU by Inductor itself, and its generated code then runs: matrix
products by torch on the CPU, every Triton kernel block by block in Triton's interpreter. So results can be compared
with the CPU's own path, forward and backward. What only hardware has is left out: blocks run one after another, so a
race between them would not show, and sums inside products are numpy's.

Buffers that the generated code allocates lie between guards and are filled with NaN: reading beyond them or before they
are written shows in the results, writing beyond them is an error. Only after ``load_fake_cuda()``.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from components.pretraining.kernel_proofs.targets import Target, stand_in
from model.compiling import set_compile_backend

_GUARD = 64  # elements on either side of a buffer


class WrittenBeyond(RuntimeError):
    """A kernel wrote outside the buffer that it was given."""


def _as_on_gpu(value: Any, trains: bool) -> Any:
    """An operator's arguments as they are captured from tensors on the GPU."""
    if isinstance(value, torch.device):
        return torch.device("cuda", 0)
    if isinstance(value, dict):
        changed = {key: _as_on_gpu(item, trains) for key, item in value.items()}
        if "OUTPUT_LOGSUMEXP" in changed:  # on CPUs FlexAttention leaves out what its backward pass reads
            changed["OUTPUT_LOGSUMEXP"] = trains
        return changed
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_as_on_gpu(item, trains) for item in value)
    return value


def _gpu_graph(graph_module: fx.GraphModule, trains: bool) -> fx.GraphModule:
    """A captured graph as it would have been captured on a GPU."""
    moved = copy.deepcopy(graph_module)
    for module in moved.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = _as_on_gpu(node.args, trains), _as_on_gpu(node.kwargs, trains)
            module.recompile()
    return moved


def _gpu_twin(value: Any, mode: Any) -> Any:
    """A fake tensor on the GPU like ``value``."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        twin = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
    return twin.requires_grad_(value.requires_grad)


def _widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16, as Triton's interpreter holds it, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to bfloat16, ties to even, as GPUs do."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Triton 3.7's own multiplies the bits of bfloat16 values as integers; products are exact, sums in d's dtype."""
    from triton.runtime.interpreter import TensorHandle

    left, right = (
        _widened(value.data) if value.dtype.scalar.name == "bf16" else value.data for value in (a, b)
    )
    return TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _cast(cast: Callable[..., Any], self: Any, source: Any, dtype: Any) -> Any:
    """Triton 3.7's own cuts float32 off where it becomes bfloat16; a GPU rounds."""
    from triton.runtime.interpreter import TensorHandle

    names = source.dtype.scalar.name, dtype.scalar.name
    if names == ("fp32", "bf16"):
        return TensorHandle(_narrowed(source.data), dtype.scalar)
    if names == ("bf16", "fp32"):
        return TensorHandle(_widened(source.data), dtype.scalar)
    return cast(self, source, dtype)


class _Libdevice:
    """CUDA's functions on numbers (exp, log, rsqrt …), which Triton's interpreter lacks, by those that it has."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl

        return getattr(tl, name)  # looked up at each call: the interpreter replaces them while a kernel runs


@contextmanager
def _exact_interpreter() -> Iterator[None]:
    """Triton's interpreter with bfloat16 as GPUs have it."""
    from triton.runtime.interpreter import InterpreterBuilder

    cast = InterpreterBuilder.cast_impl
    with (
        patch.object(InterpreterBuilder, "create_dot", _dot),
        patch.object(InterpreterBuilder, "cast_impl", lambda self, *rest: _cast(cast, self, *rest)),
        np.errstate(all="ignore"),  # what a mask discards may overflow
    ):
        yield


class _Buffers:
    """What the generated code allocates: CPU tensors between guards, of NaN as far as their dtype has it."""

    def __init__(self) -> None:
        self._made: list[tuple[torch.Tensor, int]] = []

    @staticmethod
    def _unwritten(dtype: torch.dtype) -> float | int | bool:
        if dtype.is_floating_point:
            return float("nan")
        return True if dtype == torch.bool else torch.iinfo(dtype).max - 6

    def allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """In the place of ``empty_strided_cuda``."""
        length = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
        whole = torch.full((length + 2 * _GUARD,), self._unwritten(dtype), dtype=dtype)
        self._made.append((whole, length))
        return whole.as_strided(tuple(size), tuple(stride), _GUARD)

    def check(self) -> None:
        """Raise when a guard was written, and forget the buffers.

        Raises:
            WrittenBeyond: it was.
        """
        made, self._made = self._made, []
        for whole, length in made:
            for guard in (whole[:_GUARD], whole[_GUARD + length :]):
                value = self._unwritten(whole.dtype)
                intact = guard.isnan() if whole.dtype.is_floating_point else guard == value
                if not bool(intact.all()):
                    raise WrittenBeyond(
                        f"A kernel wrote beyond a buffer of {length} elements of {whole.dtype}."
                    )


@contextmanager
def interpreted_kernels(target: Target) -> Iterator[Counter[str]]:
    """Within, CPU tensors take the CUDA path, with the kernels that Inductor writes for ``target``.

    Yields:
        How often each kernel ran, by its name.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is not 1; Triton looks at it when it is imported.
        WrittenBeyond: a kernel wrote outside its buffer.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Kernels run on CPU tensors in Triton's interpreter only: set TRITON_INTERPRET=1 first."
        )
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    ran: Counter[str] = Counter()
    buffers = _Buffers()
    launch = CachingAutotuner.run

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        ran[self.fn.__name__] += 1
        # Any of them may be chosen on a GPU; the one with the largest blocks needs the fewest steps here.
        self.configs = [max(self.configs, key=lambda config: math.prod(config.kwargs.values()))]
        return launch(self, *arguments, **options)

    def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
        with stand_in(target), patch.object(triton_helpers, "libdevice", _Libdevice()):
            code = compile_fx_inner(graph_module, example_inputs, **settings)

        def run(*arguments: Any) -> Any:
            with stand_in(target), patch.object(CachingAutotuner, "run", counted), _exact_interpreter():
                out = code(list(arguments))
            buffers.check()
            return out

        return make_boxed_func(run)

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        mode = detect_fake_mode(example_inputs)
        captured = graph_module.graph.find_nodes(op="placeholder")  # their sizes may be symbols
        twins = [_gpu_twin(node.meta["example_value"], mode) for node in captured]
        trains = any(isinstance(twin, torch.Tensor) and twin.requires_grad for twin in twins)
        # Whether products are padded is tried out on the GPU.
        settings = {"force_disable_caches": True, "compile_threads": 1, "shape_padding": False}
        with stand_in(target), torch._inductor.config.patch(settings):
            return compile_fx(_gpu_graph(graph_module, trains), twins, inner_compile=compile_graph)

    torch.compiler.reset()
    set_compile_backend(backend, fullgraph=True, on_cpus=True)
    guards = torch._C._dynamo.guards
    try:
        with (
            patch.object(guards, "_empty_strided_cuda", buffers.allocate, create=True),
            # The one place that knows the device before Inductor does.
            patch("torch.nn.attention.flex_attention._validate_device", lambda query, key, value: None),
        ):
            yield ran
    finally:
        set_compile_backend("inductor")
        torch.compiler.reset()
