"""The ``posttrain`` stage: SFT on ChatML dialogues. See ``docs/posttraining.md``."""

from components.artifacts import StageContext

VERSION = 2


def run(context: StageContext) -> dict[str, float]:
    """Fine-tune the model of pretrain's last training stage on synthesize's dialogues; returns headline metrics.

    Raises:
        StageError: an input is missing or malformed, or training diverges.
    """
    from components.posttraining.stage import run as run_stage  # torch is slow to import

    return run_stage(context)


__all__ = ["VERSION", "run"]
