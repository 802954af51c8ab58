"""Golden checkpoints: random weights in the official layout with logits of the vendor's own layer code in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import SmallThinkerForCausalLM

FOLDERS = {name: Path(__file__).parents[1] / "golden" / "hf" / f"tiny-{name}" for name in ("21b", "4b")}


def load(name: str) -> tuple[SmallThinkerForCausalLM, Tensor, Tensor]:
    """Model in float32, ``input_ids`` [2, 40] and expected logits [2, 40, 211]."""
    folder = FOLDERS[name]
    expected = load_file(folder / "expected.safetensors")
    model = SmallThinkerForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, expected["input_ids"].long(), expected["logits"]
