"""``python -m components.sources list`` and ``python -m components.sources fetch NAME... [--cache DIR]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from components.sources.cache import fetch
from components.sources.catalogue import SourceError, load_catalogue


def _note(sentence: str) -> None:
    sys.stderr.write(f"note: {sentence}\n")


def main() -> int:
    """List the catalogue or fill a cache; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m components.sources", description="Registry-borne data.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show every source")
    fetching = commands.add_parser("fetch", help="download, verify and unpack sources")
    fetching.add_argument("names", nargs="+", metavar="NAME")
    fetching.add_argument("--cache", type=Path, default=Path("runs/cache"), help="default: %(default)s")
    arguments = parser.parse_args()
    status = 0
    try:
        catalogue = load_catalogue()
        if arguments.command == "list":
            for entry in catalogue.values():
                fields = f"{entry.client:4} {entry.size_mb:6.1f} MB  {entry.version:22}"
                sys.stdout.write(f"{entry.name:24} {fields} {entry.purpose} [{entry.licence}]\n")
            return 0
        for name in arguments.names:
            try:
                folder = fetch(name, arguments.cache, note=_note)
                sys.stdout.write(f"{folder}\n")
            except SourceError as error:
                sys.stderr.write(f"error: {error}\n")
                status = 1
    except SourceError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
