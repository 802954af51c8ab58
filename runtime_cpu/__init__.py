"""The SmallThinker CPU engine: runs GGUF files of the architecture without torch.

from runtime_cpu import Engine
engine = Engine.open("model.gguf")
for token in engine.generate(engine.tokenizer.encode("Hello"), max_tokens=32):
    ...
"""

from runtime_cpu._core import EngineError, ModelFileError
from runtime_cpu.engine import Engine, EngineBusyError, ModelInfo
from runtime_cpu.generation import Generation, Stats, Token
from runtime_cpu.memory import MemoryBudgetError, MemoryPlan

__version__ = "0.1.0"  # the project's one place for it; pyproject.toml reads it from here

__all__ = [
    "Engine",
    "EngineBusyError",
    "EngineError",
    "Generation",
    "MemoryBudgetError",
    "MemoryPlan",
    "ModelFileError",
    "ModelInfo",
    "Stats",
    "Token",
    "__version__",
]
