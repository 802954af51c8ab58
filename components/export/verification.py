"""Comparison of the exported files with the merged model: every figure of ``verification.json`` is made here."""

# mypy: allow-untyped-calls
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.artifacts import sha256_file
from components.export.gguf_file import GGUFModel, gguf_names
from model import OfficialCheckpoint, SmallThinkerForCausalLM


def sample_batch(vocab_size: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two rows of token ids and their attention mask ``[2, tokens]``; the second row is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (2, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : tokens // 4] = 0
    return ids, mask


@torch.no_grad()
def reference_logits(model: SmallThinkerForCausalLM, ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` in float32."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits.float()


def row_errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Error of logits: largest absolute one, and median and 90th percentile over rows of the relative one.

    A row's relative error is ``||found - expected|| / ||expected||`` over the vocabulary.
    ``top1_agreement`` is the share of positions at which both name the same next token.
    """
    difference = (found - expected).flatten(0, -2)
    rows = difference.norm(dim=-1) / expected.flatten(0, -2).norm(dim=-1).clamp(min=1e-12)
    agreement = (found.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean()
    return {
        "max_abs": float(difference.abs().max()),
        "median_row": float(rows.median()),
        "p90_row": float(rows.quantile(0.9)),
        "top1_agreement": float(agreement),
    }


def compare_tensors(checkpoint: OfficialCheckpoint, gguf: GGUFModel) -> dict[str, Any]:
    """Read every tensor of a GGUF file back and compare it with the checkpoint's.

    Returns:
        ``tensors``: how many; ``precisions``: how many of each type; ``max_abs``; ``relative_rms``: root of
        the summed squared errors over that of the weights.
    """
    worst = squared_error = squared = 0.0
    precisions: dict[str, int] = {}
    tensors = 0
    for parameter, tensor in checkpoint.stacked():
        names = gguf_names(parameter)
        for name, part in zip(names, tensor.chunk(len(names), dim=1 if len(names) > 1 else 0), strict=True):
            expected = part.float().numpy()
            difference = gguf.read(name) - expected
            worst = max(worst, float(np.abs(difference).max()))
            squared_error += float(np.square(difference, dtype=np.float64).sum())
            squared += float(np.square(expected, dtype=np.float64).sum())
            precision = gguf.precision(name)
            precisions[precision] = precisions.get(precision, 0) + 1
            tensors += 1
    return {
        "tensors": tensors,
        "precisions": precisions,
        "max_abs": worst,
        "relative_rms": (squared_error / squared) ** 0.5 if squared else 0.0,
    }


def model_from_gguf(gguf: GGUFModel) -> SmallThinkerForCausalLM:
    """A float32 model with the file's dequantised weights and the configuration that its metadata describe."""
    with torch.device("meta"):
        model = SmallThinkerForCausalLM(gguf.config)
    model.load_state_dict(dict(gguf.parameters()), strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, left
    model.eval()
    return model


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by relative path; hidden ones are left out."""
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            files[relative.as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files
