"""The authors' predictor of output rows, on its way into a GGUF file: ``ImportedPredictor("model_lm_head.pt")``.

Both official checkpoints are published with such a file beside their safetensors: ``fc1.weight`` [width, hidden] and
``fc2.weight`` [vocabulary, width], width 256, without biases or an activation. The rows with fc2(fc1(state)) above a
threshold are computed. ``python -m runtime_cpu.pack SRC OUT --head-predictor model_lm_head.pt`` is what people call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtime_cpu.closing import ClosedAtExit
from runtime_cpu.files.checkpoint_files import CheckpointError
from runtime_cpu.files.gguf_writer import TensorInfo, Value
from runtime_cpu.files.quantiser import BLOCK, WeightError, encode
from runtime_cpu.files.torch_file import TorchFile

FILE_NAME = "model_lm_head.pt"
# The authors' own threshold is 0, and reported to miss the most probable token of 13 % of positions (4B). At -2 others
# report some 2 % (21B): who asks for a predicted head wants speed, but hardly a wrong token in every eighth.
DEFAULT_THRESHOLD = -2.0
_MOST = 1e30  # as the reader of model files has it
_AT_ONCE = 1 << 20  # weights; whole blocks
_PARTS = {"head_predictor.down.weight": "fc1.weight", "head_predictor.up.weight": "fc2.weight"}


class ImportedPredictor(ClosedAtExit):
    """A checked file, open for reading; a context manager.

    Attributes:
        width: of its inner vector: one matrix is [width, hidden], the other [vocab, width].
        hidden: the model's hidden size.
        vocab: rows of the model's output matrix.
        threshold: rows with a greater score will be computed.
    """

    def __init__(self, path: str | os.PathLike[str], threshold: float = DEFAULT_THRESHOLD) -> None:
        """Open ``path`` and check all of it.

        Raises:
            CheckpointError: it is damaged or no such predictor, or the threshold is no sensible number.
        """
        if not abs(threshold) <= _MOST:
            raise CheckpointError(
                f"the head's threshold is {threshold}; allowed are numbers from -1e30 to 1e30"
            )
        self.threshold = threshold
        self._file = TorchFile(path)
        try:
            tensors = self._file.tensors
            if set(tensors) != set(_PARTS.values()):
                names = ", ".join(repr(name[:40]) for name in list(tensors)[:4]) or "nothing"
                raise CheckpointError(
                    f"{path} holds {names}{' and more' if len(tensors) > 4 else ''}; a predictor of the head's rows "
                    f"is {' and '.join(map(repr, _PARTS.values()))} and nothing else"
                )
            down, up = (tensors[name].shape for name in _PARTS.values())
            if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not all((*down, *up)):
                raise CheckpointError(
                    f"{path}: fc1.weight has the shape {list(down)} and fc2.weight {list(up)}; they should be "
                    "[width, hidden] and [vocabulary, width]"
                )
            (self.width, self.hidden), self.vocab = down, up[0]
            if self.width > self.hidden:
                raise CheckpointError(
                    f"{path}: the predictor is {self.width} wide; at most the hidden size {self.hidden} is of use"
                )
        except BaseException:
            self.close()
            raise
        # As components.export writes its own.
        self.type = "F16" if self.hidden % BLOCK or self.width % BLOCK else "Q4_0"

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._file.close()

    def check_model(self, name: str, hidden: int, vocab: int) -> None:
        """Refuse a model of other sizes.

        Raises:
            CheckpointError: it has them.
        """
        if (self.hidden, self.vocab) != (hidden, vocab):
            raise CheckpointError(
                f"{self._file.path} predicts rows of a head with {self.vocab} rows of {self.hidden}; {name} has "
                f"{vocab} of {hidden}"
            )

    def infos(self) -> list[TensorInfo]:
        """The two tensors of a GGUF file."""
        down, up = _PARTS
        return [
            TensorInfo(down, self.type, (self.hidden, self.width)),
            TensorInfo(up, self.type, (self.width, self.vocab)),
        ]

    def metadata(self) -> dict[str, Value]:
        """The keys that belong to them; what was not measured is left out."""
        prefix = "smallthinker.head_predictor"
        return {f"{prefix}.width": self.width, f"{prefix}.threshold": np.float32(self.threshold)}

    def data(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """The bytes of one of :meth:`infos`, in slices.

        Raises:
            CheckpointError: a weight is not finite or too large, or the file has changed.
        """
        tensor = self._file.tensors[_PARTS[name]]
        for raw in self._file.read(_PARTS[name], _AT_ONCE):
            try:
                yield encode(raw, tensor.dtype, self.type)
            except WeightError as error:
                raise CheckpointError(f"{self._file.path}: {_PARTS[name]} holds {error}") from None
