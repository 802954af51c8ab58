"""Which rows of the output matrix are computed: all of them, or those that the file's predictor names.

    info = Engine.open("model.gguf", head="predictor").info.head_predictor
    print(info)                     # what was measured when the predictor was made

A predictor is two small matrices, trained at export or imported (``files/head_import.py``); it is never in use unless
asked for, because it can lose tokens. ``commands/head.py`` measures one on text.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime_cpu import _core

HEADS = ("exact", "predictor")


@dataclass(frozen=True)
class HeadPredictorInfo:
    """What the file says about its predictor.

    Attributes:
        width: of its inner vector; ``threshold``: rows with a greater score are computed.
        recall: share of the rows that matter (how many per token is the export's choice) that it named there.
        missed_argmax: share of tokens whose most probable successor it did not name. Both are ``None`` when it was
            not measured: an imported one.
    """

    width: int
    threshold: float
    recall: float | None = None
    missed_argmax: float | None = None

    def __str__(self) -> str:
        if self.recall is None or self.missed_argmax is None:
            return (
                "tokens can be lost, and how many was not measured for this file; "
                "python -m runtime_cpu.head MODEL TEXT measures it"
            )
        return (
            f"tokens can be lost: at export the predictor named {self.recall:.2%} of the rows that matter, and missed "
            f"the most probable token of {self.missed_argmax:.2%} of positions"
        )


def choose_head(model: _core.Model, head: str, name: str) -> HeadPredictorInfo | None:
    """The predictor of ``model``, if it has one.

    Raises:
        ValueError: ``head`` is none of :data:`HEADS`.
        EngineError: it is ``"predictor"`` and the file ``name`` has none.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; allowed are 'exact' and 'predictor'")
    found = model.head_predictor
    if found is None and head == "predictor":
        raise _core.EngineError(
            f"{name} has no predictor of its head's rows; open it with head='exact', or export it with "
            "export.head_predictor, or add one with python -m runtime_cpu.pack --head-predictor"
        )
    return None if found is None else HeadPredictorInfo(**found)
