"""What a teacher lacks on this machine, said before anything starts: ``preflight(config) -> problems``."""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from pathlib import Path

from components.artifacts import PROJECT
from components.synthesis.config import SynthesizeConfig, TeacherConfig
from components.synthesis.teacher.weights import is_packaged

_PROBE_S = 5.0

ALTERNATIVES = (
    "Alternatives: synthesize.teacher.kind=endpoint with base_url and model (any OpenAI-compatible server), or "
    "synthesize.teacher.kind=engine with engine_model (a GGUF file that our own engine serves)"
)


def environment_folder(config: TeacherConfig) -> Path:
    """The teacher's virtual environment; a relative path is taken from the project's folder."""
    return PROJECT / config.environment


def api_key(config: TeacherConfig) -> str:
    """The key from the environment; servers that want none get a placeholder."""
    return os.environ.get(config.api_key_env) or "none"


def probe_endpoint(config: TeacherConfig) -> str | None:
    """Why the endpoint cannot be used, or ``None``: one GET of its model list."""
    assert config.base_url is not None
    url = config.base_url.rstrip("/") + "/models"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key(config)}"})
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_S) as answer:
            answer.read(1 << 20)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return (
                f"the teacher at {config.base_url} refused the key (HTTP {error.code}); put a valid one into the "
                f"environment variable {config.api_key_env}"
            )
        if error.code in (404, 405):  # a server without a model list; the requests themselves will tell
            return None
        return f"the teacher at {config.base_url} answers HTTP {error.code}. {ALTERNATIVES}"
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"the teacher at {config.base_url} cannot be reached ({reason}). {ALTERNATIVES}"
    return None


def preflight(config: SynthesizeConfig) -> list[str]:
    """One sentence per problem that would stop the stage; empty when it can start. Starts and writes nothing."""
    teacher = config.teacher
    match teacher.kind:
        case "vllm":
            return _preflight_vllm(teacher)
        case "endpoint":
            problem = probe_endpoint(teacher)
            return [problem] if problem else []
        case "engine":
            return _preflight_engine(teacher)


def _preflight_vllm(config: TeacherConfig) -> list[str]:
    problems = []
    folder = environment_folder(config)
    if not (folder / ".ready").is_file() or not (folder / "bin" / "python").exists():
        problems.append(
            f"the teacher's environment {config.environment} is not there; `make teacher` builds it, or says why it "
            f"cannot be built on this machine. {ALTERNATIVES}"
        )
    if not is_packaged(config.weights) and not (Path(config.weights) / "config.json").is_file():
        problems.append(
            f"teacher.weights = {config.weights!r} is neither an entry of components/sources/packages.toml nor a "
            "Hugging Face model folder"
        )
    return problems


def _preflight_engine(config: TeacherConfig) -> list[str]:
    assert config.engine_model is not None
    problems = []
    if not engine_model(config).is_file():
        problems.append(f"teacher.engine_model = {config.engine_model!r} is not a file")
    if importlib.util.find_spec("runtime_cpu.serve") is None:
        problems.append("runtime_cpu is not installed with its server; run `make setup`")
    return problems


def engine_model(config: TeacherConfig) -> Path:
    """The GGUF to serve; a relative path is taken from the project's folder."""
    assert config.engine_model is not None
    return PROJECT / config.engine_model
