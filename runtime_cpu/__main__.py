"""The engine's commands under one name: ``python -m runtime_cpu`` lists them, ``python -m runtime_cpu chat`` runs one.

The console script ``smallthinker`` is the same.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime_cpu.commands.table import COMMANDS, PACKAGE


def overview() -> str:
    """Every command with a line, for people."""
    called = Path(sys.argv[0]).name
    program = f"python -m {PACKAGE}" if called in ("__main__.py", "-m") else called
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.line}" for name, command in COMMANDS.items()]
    return "\n".join(
        [f"usage: {program} COMMAND ...", "", *lines, "", f"{program} COMMAND --help says more.\n"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names. Exit code 2: there is none of that name."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"error: there is no command {name!r}; the commands are {', '.join(COMMANDS)}\n")
        return 2
    code: int = importlib.import_module(COMMANDS[name].module).main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
