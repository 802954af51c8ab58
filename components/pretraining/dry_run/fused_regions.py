"""A compile backend that writes no kernels and accounts for those that a compiler would: ``region_backend(ledger)``.

Takes the graphs that Dynamo and AOTAutograd capture, forward and backward, as Inductor does, and runs them operator by
operator over fake tensors. Matrix products and attention are kernels of their own; everything between them is taken to
fuse: a value is written only if the graph returns it or such a kernel reads it, and costs reading what it is made of.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import (  # type: ignore[import-untyped]
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from components.pretraining.dry_run.step_ledger import (
    StepLedger,
    extent_bytes,
    operator_bytes,
    operator_flops,
    tensors_in,
)

_KERNELS = {"mm", "bmm", "addmm", "_grouped_mm", "flex_attention", "flex_attention_backward"}


def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet.__name__)
    return target.name() if isinstance(target, torch._ops.HigherOrderOperator) else ""


def _is_kernel(node: fx.Node) -> bool:
    return node.op == "call_function" and _name(node.target) in _KERNELS


def _is_alias(node: fx.Node) -> bool:
    """A view, or one of several results."""
    target = node.target
    return node.op == "call_function" and (
        getattr(target, "is_view", False) or getattr(target, "__name__", "") == "getitem"
    )


def written_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values lie in memory after fusion."""
    written: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        read = any(
            user.op == "output" or _is_kernel(user) or (_is_alias(user) and user in written)
            for user in node.users
        )
        if read or _is_kernel(node) or node.op == "placeholder":
            written.add(node)
    return written


class _Region(fx.Interpreter):
    """Runs one captured graph and records its kernels in the ledger."""

    def __init__(self, graph_module: fx.GraphModule, ledger: StepLedger, backward: bool) -> None:
        super().__init__(graph_module)
        self._ledger, self._backward = ledger, backward
        self._window: int | None = None
        self._written = written_nodes(graph_module.graph)
        self._sources = self._leaves(graph_module.graph)
        self._bytes: dict[fx.Node, float] = {}
        self._attends = any("flex" in _name(node.target) for node in graph_module.graph.nodes)

    def _leaves(self, graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
        """For every node the written values that it is computed from."""
        leaves: dict[fx.Node, set[fx.Node]] = {}
        for node in graph.nodes:
            mine: set[fx.Node] = set()
            for source in node.all_input_nodes:
                mine |= {source} if source in self._written and not _is_alias(source) else leaves[source]
            leaves[node] = mine if node.op != "placeholder" else {node}
        return leaves

    def run(self, *args: Any, **kwargs: Any) -> Any:
        part, phase, self._window = self._ledger.running()
        with self._ledger.within(
            "attention" if self._attends else part, "backward" if self._backward else phase
        ):
            out = super().run(*args, **kwargs)
        self.env, self.args_iter = {}, iter(())  # else the last results live until the next run
        return out

    def run_node(self, n: fx.Node) -> Any:
        with self._ledger.suspended():
            out = super().run_node(n)
        self._bytes[n] = float(sum(map(extent_bytes, tensors_in(out))))
        if n.op != "call_function" or n not in self._written or _is_alias(n):
            return out
        if _is_kernel(n):
            name, (args, kwargs) = _name(n.target), self.fetch_args_kwargs_from_env(n)
            flops = operator_flops(name, args, self._window)
            self._ledger.charge(name, flops, operator_bytes(name, args, kwargs, out))
        else:
            self._ledger.charge(
                "fused", 0.0, self._bytes[n] + sum(self._bytes[leaf] for leaf in self._sources[n])
            )
        self._ledger.allocated(tensors_in(out))
        return out


def region_backend(ledger: StepLedger) -> Callable[..., Any]:
    """A backend for ``torch.compile`` that runs captured graphs and adds their cost to ``ledger``.

    ``ledger.graphs`` counts the captured graphs: how often something was compiled.
    """

    def compile_with(backward: bool) -> Callable[..., Any]:
        def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            return make_boxed_func(_Region(graph_module, ledger, backward).run)

        return compile_graph

    captured = aot_autograd(
        fw_compiler=compile_with(backward=False),
        bw_compiler=compile_with(backward=True),
        partition_fn=min_cut_rematerialization_partition,
    )

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        ledger.graphs += 1
        return captured(graph_module, example_inputs)

    return backend
