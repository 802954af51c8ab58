"""The ``merge`` stage: linear merging of checkpoints. See ``docs/posttraining.md``."""

from components.artifacts import StageContext

VERSION = 1


def run(context: StageContext) -> dict[str, float]:
    """Merge checkpoints at every candidate's weights and keep the best; returns headline metrics.

    Raises:
        StageError: checkpoints are missing or do not fit each other; the message names the tensor or key.
    """
    from components.merging.stage import run as run_stage  # torch and mergekit are slow to import

    return run_stage(context)


__all__ = ["VERSION", "run"]
