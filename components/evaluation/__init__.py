"""Evaluation: the sets, the prompt formats shared with SFT data, and the scores (``docs/evaluation.md``).

The package itself is the stage ``evaluate``; ``components.evaluation.sets`` is the stage ``evalsets``.
"""

from components.artifacts import StageContext

VERSION = 1


def run(context: StageContext) -> dict[str, float]:
    """The stage ``evaluate``; see :func:`components.evaluation.stage.run`."""
    from components.evaluation.stage import run as evaluate  # torch and lm-eval are slow to import

    return evaluate(context)
