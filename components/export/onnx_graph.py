"""ONNX export of the whole-sequence forward pass: ``export_onnx(model, folder / "model.onnx")``.

Inputs ``input_ids`` and ``attention_mask`` (int64 ``[batch, sequence]``), output ``logits`` (float32
``[batch, sequence, vocabulary]``); batch and sequence are dynamic. Every expert is computed for every token
and unchosen ones are weighted
zero: ONNX has no gated ReLU mixture-of-experts operator, and this form has no data-dependent shapes. It
suits scoring and small models; decoding on devices is the engine's business.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from model import SmallThinkerForCausalLM

OPSET = 20


class _Logits(nn.Module):
    """The model as a function of two tensors."""

    def __init__(self, model: SmallThinkerForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits
        return logits


def export_onnx(model: SmallThinkerForCausalLM, path: Path) -> None:
    """Write ``path`` and its weights ``<path>.data``. The model must be in float32, on the CPU and in eval mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = torch.ones(2, 6, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    model.set_expert_backend("dense")
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Logits(model),
                (ids, mask),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=({0: batch, 1: sequence}, {0: batch, 1: sequence}),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=False,
            )
        assert program is not None
        program.save(str(path), external_data=True)
    finally:
        model.set_expert_backend("auto")
        exporter_log.setLevel(level)


def compare_onnx(model: SmallThinkerForCausalLM, path: Path, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Largest absolute difference of logits between onnxruntime and torch, at real tokens.

    Args:
        model: the model in float32.
        path: the exported graph.
        batches: pairs of ``input_ids`` and ``attention_mask``.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for ids, mask in batches:
        (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert expected is not None
        real = mask.bool().numpy()
        worst = max(worst, float(np.abs(found - expected.numpy())[real].max()))
    return worst
