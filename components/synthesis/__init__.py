"""Stage ``synthesize``: documents and dialogues that a teacher writes, filtered and counted. See docs/synthesis.md."""

from components.synthesis.config import SynthesizeConfig, TeacherConfig
from components.synthesis.preflight import preflight
from components.synthesis.stage import VERSION, run

__all__ = ["VERSION", "SynthesizeConfig", "TeacherConfig", "preflight", "run"]
