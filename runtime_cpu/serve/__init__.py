"""An OpenAI-compatible HTTP server and chat page for one model: ``python -m runtime_cpu.serve MODEL``."""

from runtime_cpu.serve.app import ServerSettings, build_app

__all__ = ["ServerSettings", "build_app"]
