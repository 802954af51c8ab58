"""Export: official Hugging Face folder, GGUF for the engine and llama.cpp, ONNX, and the proof that they agree."""

from components.artifacts import StageContext
from components.export.config import ExportConfig

VERSION = 1


def run(context: StageContext) -> dict[str, float]:
    """Export the merged model; returns headline metrics. See :func:`components.export.stage.run`.

    Raises:
        StageError: an input is missing or torn, or a file does not reproduce the model.
    """
    from components.export.stage import run as run_stage  # torch and the ONNX tools are slow to import

    return run_stage(context)


__all__ = ["VERSION", "ExportConfig", "run"]
