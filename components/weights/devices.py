"""The device that a stage runs on: ``choose_device("auto")``."""

from __future__ import annotations

import torch

from components.artifacts import StageError


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device.

    Raises:
        StageError: ``cuda`` is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise StageError("device is cuda, but torch finds no CUDA device here; use auto or cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
