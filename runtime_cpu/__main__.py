"""The engine's commands under one name: ``smallthinker chat MODEL``, ``python -m runtime_cpu chat MODEL``."""

from __future__ import annotations

import importlib
import sys

_COMMANDS = ("bench", "chat", "head", "inspect", "logits", "pack", "perplexity", "serve", "synth")


def main(argv: list[str] | None = None) -> int:
    """List the commands, or run one. Exit code 2: there is no such command."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write("commands:\n" + "".join(f"  {name}\n" for name in _COMMANDS))
        return 0
    if arguments[0] not in _COMMANDS:
        sys.stderr.write(f"error: there is no command {arguments[0]}\n")
        return 2
    module = importlib.import_module(f"runtime_cpu.{arguments[0]}")
    result: int = module.main(arguments[1:])
    return result


if __name__ == "__main__":
    sys.exit(main())
