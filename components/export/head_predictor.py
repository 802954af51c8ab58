"""The paper's low-rank predictor of the output rows that matter: ``train(head, fit, held, config)``.

Two products without a non-linearity, score = up (down state), name the rows whose logits are worth computing; the
engine computes those and takes the others for minus infinity (``Engine.open(head="predictor")``). The paper publishes
no recipe for its training. Ours: positives are the rows of the greatest logits on held-out text, the loss is binary
cross-entropy with both classes at equal weight, the initial weights are the best low-rank approximation of the logits,
and the threshold is the one that finds the wanted share of positives on states that were not trained on, with weights
rounded as stored.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor
from tqdm import tqdm

from components.artifacts import StageError
from components.export.config import HeadPredictorConfig
from components.export.head_states import TILE_ROWS, Floats
from components.measures.intervals import wilson_interval

_INITIAL_STD = 3.0  # of the scores before training: the sigmoid is not saturated there
_ROWS_AT_ONCE = 64  # positions of which all logits are in memory


@dataclass(frozen=True)
class HeadPredictor:
    """A trained predictor.

    Attributes:
        down: ``[width, hidden]``; ``up``: ``[vocabulary, width]``, both as they read back from the file.
        precision: of the file's tensors.
        threshold: rows with a greater score are computed.
        report: what was measured on text that neither training nor the threshold saw, see :func:`evaluate`.
    """

    down: Floats
    up: Floats
    precision: GGMLQuantizationType
    threshold: float
    report: dict[str, float]


def split_parts(config: HeadPredictorConfig) -> tuple[float, float, float]:
    """Shares of the states for training, for the threshold, and for the report."""
    rest = (1 - config.training_share) / 2
    return config.training_share, rest, rest


def train(
    head: Floats, states: tuple[Floats, Floats, Floats], config: HeadPredictorConfig, seed: int
) -> HeadPredictor:
    """Train on the first states, choose the threshold on the second, report on the third.

    Args:
        head: the output matrix ``[V, D]``.
        states: what it reads, ``[N_i, D]``; of three stretches of text that do not overlap.

    Raises:
        StageError: the predictor does not fit the model.
    """
    rows, size = head.shape
    if config.width > size or config.top_rows >= rows:
        raise StageError(
            f"export.head_predictor.width is {config.width} and top_rows {config.top_rows}; the head has {size} "
            f"columns and {rows} rows."
        )
    weight, fit = torch.from_numpy(head), torch.from_numpy(states[0])
    down, up = low_rank_start(weight, fit, config.width)
    up *= _INITIAL_STD / (fit[: 4 * _ROWS_AT_ONCE] @ down.T @ up.T).std()
    down, up = torch.nn.Parameter(down), torch.nn.Parameter(up)
    positives_NK = torch.cat([top_rows(weight, part, config.top_rows) for part in fit.split(_ROWS_AT_ONCE)])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # initial bias: the wanted share of positives scores above 0
        sample = fit[: 4 * _ROWS_AT_ONCE]
        found = (sample @ down.T @ up.T).gather(1, positives_NK[: len(sample)])
        offset = torch.nn.Parameter(found.flatten().quantile(1 - config.target_recall))
    spreads = ((down, float(down.detach().std())), (up, float(up.detach().std())), (offset, _INITIAL_STD))
    optimiser = torch.optim.Adam(
        [{"params": [value], "lr": config.learning_rate * spread} for value, spread in spreads]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, total_iters=config.steps)
    for _ in tqdm(range(config.steps), desc="head predictor", unit="step"):
        chosen = torch.randint(len(fit), (config.batch,), generator=generator)
        scores = fit[chosen] @ down.T @ up.T - offset
        loss = balanced_loss(scores, positives_NK[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    precision = GGMLQuantizationType.Q4_0
    if config.precision == "f16" or size % 32 or config.width % 32:
        precision = GGMLQuantizationType.F16
    stored_down, stored_up = (stored(value.detach().numpy(), precision) for value in (down, up))
    threshold = find_threshold(head, states[1], stored_down, stored_up, config)
    report = evaluate(head, states[2], stored_down, stored_up, threshold, config.top_rows)
    report["threshold"] = threshold
    return HeadPredictor(stored_down, stored_up, precision, threshold, report)


def low_rank_start(weight: Tensor, fit: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Down and up whose product is the matrix's best approximation on states like these.

    States are brought to a basis in which their second moments are 1; the inner vector's then are too.
    """
    moments = (fit.T @ fit / len(fit)).double()
    values, vectors = torch.linalg.eigh(moments)
    scales = values.clamp(min=1e-6 * float(values[-1])).sqrt()
    rows = weight.double() @ (vectors * scales)
    _, turned = torch.linalg.eigh(rows.T @ rows)
    basis = turned[:, -width:]
    down = (vectors / scales @ basis).T
    return down.float().contiguous(), (rows @ basis).float().contiguous()


def top_rows(weight: Tensor, states: Tensor, count: int) -> Tensor:
    """Ids ``[n, count]`` of the greatest logits, greatest first."""
    return (states @ weight.T).topk(count, dim=1).indices


def balanced_loss(scores: Tensor, positives: Tensor) -> Tensor:
    """Binary cross-entropy in which positives and negatives weigh the same in total."""
    found = scores.gather(1, positives)
    everything = F.softplus(scores).sum() - F.softplus(found).sum()
    return F.softplus(-found).mean() + everything / (scores.numel() - found.numel())


def stored(values: Floats, precision: GGMLQuantizationType) -> Floats:
    """The values that a file of this precision gives back."""
    if precision == GGMLQuantizationType.F16:
        return values.astype(np.float16).astype(np.float32)
    result: Floats = quants.dequantize(quants.quantize(values, precision), precision)
    return result.astype(np.float32, copy=False)


def find_threshold(
    head: Floats, states: Floats, down: Floats, up: Floats, config: HeadPredictorConfig
) -> float:
    """The score above which the wanted share of the rows that matter lies."""
    found = []
    for start in range(0, len(states), _ROWS_AT_ONCE):
        part = torch.from_numpy(states[start : start + _ROWS_AT_ONCE])
        positives = top_rows(torch.from_numpy(head), part, config.top_rows)
        found.append(
            (part @ torch.from_numpy(down).T @ torch.from_numpy(up).T).gather(1, positives).flatten()
        )
    scores = torch.cat(found).sort().values
    at = min(len(scores) - 1, math.floor((1 - config.target_recall) * len(scores)))
    # Just below it, so that the row itself is computed.
    return float(np.nextafter(np.float32(scores[at]), np.float32(-np.inf)))


def evaluate(
    head: Floats, states: Floats, down: Floats, up: Floats, threshold: float, count: int
) -> dict[str, float]:
    """What computing only the named rows loses.

    Returns:
        ``recall`` of the ``count`` greatest logits; ``missed_argmax`` with its 95 % interval; ``active_rows`` and
        ``active_tiles`` (of 16 rows): shares that are read; ``lost_mass``: mean probability of the rows left out;
        ``positions``.
    """
    weight, first, second = (torch.from_numpy(value) for value in (head, down, up))
    sums = dict.fromkeys(("recall", "missed", "active_rows", "active_tiles", "lost_mass"), 0.0)
    for start in range(0, len(states), _ROWS_AT_ONCE):
        part = torch.from_numpy(states[start : start + _ROWS_AT_ONCE])
        logits, named = part @ weight.T, part @ first.T @ second.T > threshold
        best = named.gather(1, logits.topk(count, dim=1).indices)
        sums["recall"] += float(best.float().mean(dim=1).sum())
        sums["missed"] += float((~best[:, 0]).sum())
        sums["active_rows"] += float(named.float().mean(dim=1).sum())
        tiles = F.pad(named, (0, -named.shape[1] % TILE_ROWS)).unflatten(1, (-1, TILE_ROWS)).any(dim=2)
        sums["active_tiles"] += float(tiles.float().mean(dim=1).sum())
        sums["lost_mass"] += float(logits.softmax(dim=1).masked_fill(named, 0.0).sum())
    missed = round(sums.pop("missed"))
    low, high = wilson_interval(missed, len(states))
    report: dict[str, Any] = {name: value / len(states) for name, value in sums.items()}
    return {
        **report,
        "missed_argmax": missed / len(states),
        "missed_argmax_low": low,
        "missed_argmax_high": high,
        "positions": float(len(states)),
    }
