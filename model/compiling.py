"""What ``torch.compile`` compiles with, chosen in one place: ``fast = compiled(function)``.

A dry run without a GPU (``components.pretraining.dry_run``) replaces the backend, which writes kernels, by one that
only accounts for them; everything up to the captured graph is then the same.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import wraps
from types import CodeType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

MOST_KINDS = 64  # of input, for one code object

_made: list[list[Any]] = []  # what was compiled, by every function of compiled()
_settings: dict[str, Any] = {"backend": "inductor", "fullgraph": False}
_on_cpus = [False]
_fixed_sizes = [False]


def takes_kernels(tensor: torch.Tensor) -> bool:
    """Whether what is computed from ``tensor`` takes the path of the GPUs, compiled, or else the CPU's own."""
    return tensor.is_cuda or _on_cpus[0]


def set_compile_backend(
    backend: str | Callable[..., Any], fullgraph: bool = False, on_cpus: bool = False
) -> None:
    """From now on compile with ``backend`` (as ``torch.compile`` takes it); modules compiled before keep theirs.

    Args:
        backend: ``"inductor"``, or what stands in for it.
        fullgraph: raise where the graph breaks, instead of compiling the parts.
        on_cpus: tensors on the CPU take the path of the GPUs too, as a backend that can run it there wants.
    """
    _settings.update(backend=backend, fullgraph=fullgraph)
    _on_cpus[0] = on_cpus
    for made in _made:
        made.clear()


def compiled(
    function: Callable[_Arguments, _Result], dynamic: bool | None = None, varying: bool = False
) -> Callable[_Arguments, _Result]:
    """``torch.compile(function)`` when it is first called.

    Args:
        function: what is compiled.
        dynamic: as there; ``None``: sizes are fixed in training, and what torch makes of them elsewhere.
        varying: sizes change from call to call in training too (rows under expert parallelism).
    """
    made: list[Callable[_Arguments, _Result]] = []
    _made.append(made)

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not made:
            fixed = _fixed_sizes[0] and dynamic is None and not varying
            made.append(torch.compile(function, dynamic=False if fixed else dynamic, **_settings))
        return made[0](*args, **kwargs)

    return call


def compile_module(module: nn.Module) -> None:
    """Compile a module's forward in place, for every shape anew: training and evaluation have few, all known."""
    module.compile(dynamic=False, **_settings)


def refuse_fallbacks() -> None:
    """From now on code that is compiled for too many kinds of input ends the program; sizes are fixed in kernels.

    By default torch gives up after 8 and goes on uncompiled with a line in the log. One code object serves all layers
    here: training and evaluation, windowed and global layers and the shapes of two contexts are 8 already.

    Raises (later, in what was compiled):
        torch._dynamo.exc.FailOnRecompileLimitHit: more than 64 kinds of input.
    """
    dynamo_config.recompile_limit = MOST_KINDS
    dynamo_config.fail_on_recompile_limit_hit = True
    _fixed_sizes[0] = True
    for made in _made:
        made.clear()


def refused_function(error: FailOnRecompileLimitHit) -> str:
    """The function that was to be compiled once more, which torch says in its log only; empty if it cannot be found."""
    codes = [frame.f_locals.get("code") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((code.co_qualname for code in reversed(codes) if isinstance(code, CodeType)), "")


def compiled_graphs() -> int:
    """Graphs that torch has compiled in this process so far."""
    return int(counters["stats"]["unique_graphs"])
