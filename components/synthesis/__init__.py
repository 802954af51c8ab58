"""Stage ``synthesize``: documents and dialogues that a teacher writes, filtered and counted. See docs/synthesis.md."""

from components.artifacts import StageContext
from components.synthesis.config import SynthesizeConfig, TeacherConfig
from components.synthesis.teacher.preflight import preflight

VERSION = 1


def run(context: StageContext) -> dict[str, float]:
    """Build the artefact; see :func:`components.synthesis.stage.run`.

    Raises:
        StageError: the teacher cannot be had or fails again and again, an input is damaged, or the config is wrong.
    """
    from components.synthesis.stage import run as run_stage  # the teacher's client is slow to import

    return run_stage(context)


__all__ = ["VERSION", "SynthesizeConfig", "TeacherConfig", "preflight", "run"]
