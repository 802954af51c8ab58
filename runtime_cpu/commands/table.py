"""The engine's commands: their names, where they live, and a line on each. ``python -m runtime_cpu`` prints it.

Every command is called as ``python -m runtime_cpu.NAME`` too. ``bench`` and the other packages have a ``__main__.py``
for that; the names of single modules are found here, by :class:`CommandFinder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PACKAGE = "runtime_cpu"


class Command(NamedTuple):
    """A command: ``module`` has its ``main(arguments)``, which returns the exit code; ``line`` says what it does."""

    module: str
    line: str


COMMANDS = {
    "pack": Command(
        "runtime_cpu.pack.__main__", "make a model file of a checkpoint, or of a stock GGUF file"
    ),
    "inspect": Command("runtime_cpu.commands.inspect_model", "what a file holds, and what running it costs"),
    "chat": Command("runtime_cpu.commands.chat", "a conversation in the terminal"),
    "serve": Command("runtime_cpu.serve.__main__", "OpenAI's protocol and a chat page over HTTP"),
    "bench": Command(
        "runtime_cpu.bench.__main__", "speed and memory on this machine, beside llama.cpp if wanted"
    ),
    "perplexity": Command("runtime_cpu.commands.perplexity", "how well a model predicts a text"),
    "head": Command("runtime_cpu.commands.head", "what a predicted head loses on a text"),
    "logits": Command("runtime_cpu.commands.logits", "the logits of given tokens, as a .npy file"),
    "reads": Command("runtime_cpu.commands.reads", "what reading experts from the file costs on a text"),
    "synth": Command(
        "runtime_cpu.synth.__main__", "a file of random weights that behaves like a trained model"
    ),
}
# Processes that `bench` starts. They were modules of their own at the top once, and may be called by these names.
_PROCESSES = {"bench_machine": "runtime_cpu.bench.machine", "bench_worker": "runtime_cpu.bench.worker"}


class CommandFinder:
    """Finds ``runtime_cpu.inspect``, say, in ``commands/inspect_model.py``; the last one that an import asks.

    A file for each name would do as well, but not for ``inspect``: a script in the same folder, or one whose path
    Python searches first, would get it in place of the standard library's.
    """

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module of a command, under the name that was asked for: ``python -m`` insists on it."""
        package, _, name = fullname.rpartition(".")
        if package != PACKAGE:
            return None
        module = COMMANDS[name].module if name in COMMANDS else _PROCESSES.get(name)
        if module is None:
            return None
        from importlib.util import (
            spec_from_file_location,  # only then: every start of the engine reads this file
        )

        file = Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
        return spec_from_file_location(fullname, file)
