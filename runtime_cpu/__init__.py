"""The SmallThinker CPU engine: runs GGUF files of the architecture without torch.

from runtime_cpu import Engine
engine = Engine.open("model.gguf")
for token in engine.generate(engine.tokenizer.encode("Hello"), max_tokens=32):
    ...
"""

import sys

from runtime_cpu._core import EngineError, ModelFileError
from runtime_cpu.commands.table import CommandFinder
from runtime_cpu.engine.engine import Engine
from runtime_cpu.engine.generation import Generation
from runtime_cpu.engine.info import ModelInfo
from runtime_cpu.engine.sampling import Token
from runtime_cpu.engine.sessions import EngineBusyError
from runtime_cpu.engine.stats import Stats
from runtime_cpu.memory.plan import MemoryBudgetError, MemoryPlan

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

# So that `python -m runtime_cpu.chat` and its like find their modules in `commands/`.
if CommandFinder not in sys.meta_path:
    sys.meta_path.append(CommandFinder)
