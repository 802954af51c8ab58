"""Inductor's kernels for a GPU that is not there: ``collected = Collected()``, ``lowering_backend(collected, target)``.

Unlike the dry run's backend this is Inductor itself, from the captured graph to the source of every Triton kernel; the
graphs then run operator by operator over fake tensors, and the sources are kept.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import fx
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from components.pretraining.kernel_proofs.targets import Target, stand_in

_CALLS = re.compile(r"\b(?:extern_kernels\.(\w+)\(|torch\.ops\.aten\.(\w+)\.\w+\()")


@dataclass
class Collected:
    """What Inductor wrote.

    Attributes:
        moment: a word for what is being run, set by who runs it.
        kernels: name and moment of every Triton kernel by its source.
        library_calls: how often the generated code calls which operator of ATen's libraries.
        graphs: compiled, forward and backward.
    """

    moment: str = ""
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)
    library_calls: Counter[str] = field(default_factory=Counter)
    graphs: int = 0


def lowering_backend(
    collected: Collected, target: Target, fake_mode: Any
) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
    """A backend for ``torch.compile`` that adds what Inductor writes for ``target`` to ``collected``.

    Args:
        collected: is added to.
        target: the GPU.
        fake_mode: the mode that the tensors belong to.
    """

    def keep(self: AsyncCompile, kernel_name: str, source_code: str, device_str: str = "cuda") -> None:
        collected.kernels.setdefault(source_code, (kernel_name, collected.moment))

    def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
        with stand_in(target), patch.object(AsyncCompile, "triton", keep):
            code = compile_fx_inner(graph_module, example_inputs, **settings)
        collected.graphs += 1
        for extern, aten in _CALLS.findall(getattr(code, "source_code", "") or ""):
            collected.library_calls[extern or aten] += 1
        interpreter = fx.Interpreter(graph_module)

        def run(*arguments: Any) -> Any:
            # The backward pass runs in autograd's thread, where no mode is active.
            with fake_mode:
                return interpreter.run(*arguments)

        return make_boxed_func(run)

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        settings = {"force_disable_caches": True, "compile_threads": 1}
        with stand_in(target), torch._inductor.config.patch(settings):
            return compile_fx(graph_module, example_inputs, inner_compile=compile_graph)

    return backend
