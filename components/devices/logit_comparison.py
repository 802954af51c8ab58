"""Compares the engine's logits with torch's: ``compare_logits(ours, torch_logits(folder, token_ids))``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.artifacts import StageError


@dataclass(frozen=True)
class LogitComparison:
    """How far two sets of logits [T, V] are apart.

    Attributes:
        tokens: rows compared.
        max_row_error, median_row_error: Euclidean distance of a row, over the length of torch's row.
        max_absolute_error: largest difference of a single logit.
        same_choice: share of rows whose greatest logit is the same.
    """

    tokens: int
    max_row_error: float
    median_row_error: float
    max_absolute_error: float
    same_choice: float


def compare_logits(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> LogitComparison:
    """Distance of ``ours`` [T, V] from ``theirs`` [T, V]. NaN anywhere counts as infinitely far.

    Raises:
        StageError: the vocabularies differ.
    """
    if ours.shape != theirs.shape:
        raise StageError(
            f"the exported file gives logits of shape {ours.shape}, the merged model {theirs.shape}; export it again"
        )
    difference = ours.astype(np.float64) - theirs
    difference[~np.isfinite(difference)] = np.inf
    rows = np.linalg.norm(difference, axis=1) / np.linalg.norm(theirs.astype(np.float64), axis=1)
    return LogitComparison(
        tokens=len(ours),
        max_row_error=float(rows.max()),
        median_row_error=float(np.median(rows)),
        max_absolute_error=float(np.abs(difference).max()),
        same_choice=float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1))),
    )


def torch_logits(folder: Path, token_ids: NDArray[np.integer]) -> NDArray[np.float32]:
    """Logits [T, V] of the Hugging Face model in ``folder`` after each of ``token_ids`` [T], all in float32."""
    import torch

    from components.weights.model_folders import load_model

    with torch.inference_mode():
        network = load_model(folder)
        ids = torch.from_numpy(np.asarray(token_ids, np.int64))[None]
        rows: NDArray[np.float32] = network(input_ids=ids).logits[0].float().numpy()
    return rows
