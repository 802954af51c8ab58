"""Balance by a bias on the routers' choice instead of a loss: ``BalanceBias(1e-3, 0.1, 1000)``.

As in arXiv 2408.15664 and DeepSeek-V3: after every optimizer step an expert that got less than the mean becomes a
little more attractive, and one that got more a little less. The bias decides which experts are chosen, never their
weights, so that it adds no gradient. It is made from counts of the whole global batch, so that all ranks hold the same
one on any mesh, and goes into checkpoints.

The official file format has no such bias, nor have the engines that read it. So it is a help in training only: the
model's evaluations and exports do without, and towards the end of the run it fades to exactly 0, so that the last
weights were trained with the choice that they are used with.

Legend: L layers, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model import SmallThinkerForCausalLM


class BalanceBias:
    """The bias of every layer's experts, in units of the router's sigmoid scores.

    Args:
        rate: step of the bias; 0: there is none.
        fade: share of the run's steps, at its end, over which the bias fades.
        total_steps: of the run.
    """

    def __init__(self, rate: float, fade: float, total_steps: int) -> None:
        self._rate, self._total = rate, total_steps
        self._fade_steps = max(1, round(fade * total_steps))
        self._bias_LE: Tensor | None = None

    def strength(self, step: int) -> float:
        """What the bias is multiplied by in step ``step``: 1, then falling, and 0 in the run's last step."""
        return min(1.0, (self._total - 1 - step) / self._fade_steps)

    def apply(self, model: SmallThinkerForCausalLM, step: int) -> None:
        """Let the routers choose with the bias of step ``step``."""
        if self._bias_LE is not None:
            device = model.lm_head.weight.device
            model.set_choice_bias((self._bias_LE * self.strength(step)).to(device))

    def update(self, counts_LE: Tensor) -> None:
        """Take a step's counts into account.

        Args:
            counts_LE: tokens of the whole global batch that chose each expert, the same on all ranks.
        """
        if not self._rate:
            return
        counts_LE = counts_LE.float()
        if self._bias_LE is None:
            self._bias_LE = torch.zeros_like(counts_LE)
        self._bias_LE = self._bias_LE + self._rate * (counts_LE.mean(dim=1, keepdim=True) - counts_LE).sign()

    def to_state(self) -> list[list[float]] | None:
        """Plain values for a checkpoint."""
        return None if self._bias_LE is None else self._bias_LE.tolist()

    def load_state(self, state: Any) -> None:
        """Restore :meth:`to_state`; without a rate there is none to restore."""
        self._bias_LE = torch.tensor(state, dtype=torch.float32) if state and self._rate else None
