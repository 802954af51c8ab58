"""Run by test_compilations.py in a process of its own: ``python -m tests.pretraining.compile_job TOKENS OUT LIMIT``.

Trains three training stages with compiled layers and prints when graphs were compiled, as JSON. Graphs are captured as
for Inductor and run as they are: what is compiled when is Dynamo's business alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import model.compiling as compiling
from components.artifacts import StageContext, StageError
from components.pretraining import run
from components.pretraining.training.trainer import Trainer
from tests.pretraining.factory import run_config


def main(tokens: str, out: str, limit: str) -> None:
    graphs: list[str] = []
    moment = ["start"]

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(moment[0])
        return graph.forward

    compiling.set_compile_backend(backend)
    if limit != "0":
        compiling.MOST_KINDS = int(limit)
    step, evaluate = Trainer._train_step, Trainer._evaluate

    def named_step(self: Any, bar: Any) -> float:
        moment[0] = f"step {self._step}"
        return step(self, bar)

    def named_evaluate(self: Any, span: Any, when: str) -> None:
        moment[0] = f"{span.name}:{when}"
        evaluate(self, span, when)

    Trainer._train_step, Trainer._evaluate = named_step, named_evaluate  # type: ignore[method-assign]
    folder = Path(out)
    folder.mkdir(parents=True)
    config = {**run_config(), "compile_layers": True, "activation_checkpointing": True, "recompute_every": 2}
    context = StageContext("pretrain", "tiny", config, {"tokenize": Path(tokens)}, folder, folder / "cache")
    result: dict[str, Any] = {"error": None}
    try:
        run(context)
    except StageError as error:
        result["error"] = str(error)
    finally:
        context.close()
    print(json.dumps({**result, "graphs": graphs, "notes": context.notes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
