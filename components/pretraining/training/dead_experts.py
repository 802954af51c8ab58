"""Says when experts of a layer get hardly any tokens: ``DeadExperts(0.1, 10).watch(loads_LE, step)``.

A dead expert gets no gradient but the balance loss's, so it seldom comes back by itself, and a run that loses experts
early trains a smaller model than it pays for. The state goes into checkpoints, so that a resumed run says the same.

Legend: L layers, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeadExperts:
    """Counts for every expert how many logged intervals in a row it got less than a share of the mean load.

    Args:
        share: of the mean load of a layer's experts, below which one counts as dead.
        intervals: logged intervals in a row after which the alarm is raised, once per expert and run.
    """

    def __init__(self, share: float, intervals: int) -> None:
        self._share, self._intervals = share, intervals
        self._below: Tensor | None = None  # [L, E], intervals in a row
        self._raised: Tensor | None = None  # [L, E], whether the alarm was raised
        self.alarms: list[str] = []

    def watch(self, loads_LE: Tensor, step: int) -> str | None:
        """Take an interval into account.

        Args:
            loads_LE: each expert's load, 1 at balance.
            step: optimizer steps done.

        Returns:
            The alarm, when it is raised for an expert for the first time.
        """
        dead_LE = loads_LE < self._share
        if self._below is None or self._raised is None:
            self._below = torch.zeros_like(dead_LE, dtype=torch.int64)
            self._raised = torch.zeros_like(dead_LE)
        self._below = torch.where(dead_LE, self._below + 1, 0)
        new_LE = (self._below >= self._intervals) & ~self._raised
        if not new_LE.any():
            return None
        self._raised |= new_LE
        places = "; ".join(
            f"layer {layer}: {', '.join(map(str, new_E.nonzero()[:, 0].tolist()))}"
            for layer, new_E in enumerate(new_LE)
            if new_E.any()
        )
        alarm = (
            f"Step {step}: dead experts, below {self._share:g} of their layer's mean load for {self._intervals} "
            f"logged intervals: {places}. Raise load_balance_coef."
        )
        self.alarms.append(alarm)
        return alarm

    def metrics(self, loads_LE: Tensor) -> dict[str, float]:
        """Share of dead experts of an interval, by layer and of all."""
        dead_L = (loads_LE < self._share).double().mean(dim=1)
        by_layer = {f"router/dead/layer{layer:02d}": float(dead) for layer, dead in enumerate(dead_L)}
        return {"router/dead": float(dead_L.mean()), **by_layer}

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        below, raised = ([] if x is None else x.tolist() for x in (self._below, self._raised))
        return {"below": below, "raised": raised, "alarms": list(self.alarms)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`to_state`."""
        if state["below"]:
            self._below, self._raised = torch.tensor(state["below"]), torch.tensor(state["raised"])
        self.alarms = list(state["alarms"])
