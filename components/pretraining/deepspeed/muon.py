"""Muon for the matrices of attention and experts, AdamW for the rest, below ZeRO-1 and 2: ``MuonAdamW(groups, …)``.

Muon (Jordan 2024; Liu et al., arXiv 2502.16982) replaces a matrix's momentum by the nearest orthogonal matrix, so it
needs the matrix whole, while ZeRO gives the optimizer a flat partition of a group's elements. Every rank orthogonalises
the matrices that lie in its partition; one that a boundary cuts is first put together from its pieces. The products are
those of ``torch.optim.Muon``, scaled so that AdamW's rate and decay serve both (``match_rms_adamw``).
DeepSpeed 0.19.8's own Muon orthogonalises before it takes the gradient's norm, so that clipping and the loss guard
would see the norm of updates.

The state has the shape of AdamW's, its second moment staying zero, so that every checkpoint and its resharding hold.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from components.pretraining.deepspeed.parameter_names import official_parameter


class _Matrix(NamedTuple):
    """One matrix in a group's flat order: its first element and its shape."""

    begin: int
    shape: tuple[int, int]

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for groups whose ``muon`` is true.

    Call :meth:`attach` once the engine is built: only then is it known which elements are whose.

    Args:
        groups: see :func:`components.weights.optimizer.parameter_groups`.
        momentum: of Muon, with Nesterov's look ahead.
        **adamw: AdamW's arguments.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        self._momentum = momentum
        self._zero: Any = None
        super().__init__(groups, **adamw)

    def attach(self, zero: Any) -> None:
        """Tell it DeepSpeed's ZeRO-1 or 2 optimizer, which partitions the groups."""
        self._zero = zero

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update this rank's partitions from the averaged and clipped gradients that lie in ``grad``."""
        assert closure is None and self._zero is not None, "attach() comes before the first step"
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)
        return None

    def _step_matrices(self, group: dict[str, Any]) -> None:
        (flat,) = group["params"]
        # ZeRO calls step() once for every group, with param_groups cut down to it.
        number = next(i for i, p in enumerate(self._zero.single_partition_of_fp32_groups) if p is flat)
        state = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        state["step"] += 1
        state["exp_avg"].lerp_(flat.grad, 1 - self._momentum)
        update = flat.grad.lerp(state["exp_avg"], self._momentum)
        process_group = self._zero.real_dp_process_group[number]
        start = dist.get_rank(process_group) * flat.numel()
        targets, wholes = [], []
        for matrix in self._matrices(number):
            first, last = max(matrix.begin, start), min(matrix.end, start + flat.numel())
            mine = slice(first - start, last - start)
            if first == matrix.begin and last == matrix.end:
                whole = update[mine]
            elif matrix.begin // flat.numel() == (matrix.end - 1) // flat.numel():
                continue  # whole on another rank
            else:
                whole = torch.zeros(math.prod(matrix.shape), dtype=flat.dtype, device=flat.device)
                if first < last:
                    whole[first - matrix.begin : last - matrix.begin] = update[mine]
                dist.all_reduce(whole, group=process_group)  # every element is one rank's: nothing is rounded
                if first >= last:
                    continue
            targets.append((mine, slice(first - matrix.begin, last - matrix.begin)))
            wholes.append(whole.view(matrix.shape))
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for (mine, part), direction in zip(targets, orthogonalised(wholes), strict=True):
            flat[mine].add_(direction.view(-1)[part], alpha=-group["lr"])

    def _matrices(self, number: int) -> Iterator[_Matrix]:
        """The matrices of a group, in the order in which ZeRO lays them out; experts one by one, gate and up apart."""
        begin = 0
        for parameter in self._zero.bit16_groups[number]:
            name = official_parameter(self._zero.param_names[parameter])
            rows, columns = parameter.shape[-2:]
            if name is None:  # w3, a placeholder that gets no gradient
                begin += parameter.numel()
                continue
            if name.endswith("gate_up_proj"):
                rows //= 2
            for _ in range(parameter.numel() // (rows * columns)):
                yield _Matrix(begin, (rows, columns))
                begin += rows * columns


def orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix's nearest orthogonal one, roughly, times ``0.2 * sqrt(max(rows, columns))``: AdamW's usual size.

    ``torch.optim.Muon`` without momentum and decay, on weights of zero: what is left of its step is the direction.
    """
    if not matrices:
        return []
    directions = [torch.nn.Parameter(torch.zeros_like(matrix)) for matrix in matrices]
    for direction, matrix in zip(directions, matrices, strict=True):
        direction.grad = -matrix
    torch.optim.Muon(
        directions, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()
    return [direction.detach() for direction in directions]
