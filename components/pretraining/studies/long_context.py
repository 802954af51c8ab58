"""Compares two exported models by position, before and after the context was extended (``measures/positions.py``).

``python -m components.pretraining.studies.long_context TOKENS STAGE2 STAGE3 --old 256 --new 512``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.measures.positions import measure


def table(answer: Mapping[str, Any]) -> str:
    """The comparison as text."""
    lines = [f"{'positions':<14}{'before':>9}{'after':>9}{'change (95 % interval)':>30}"]
    for band in answer["bands"]:
        interval = f"{band['change']:+.4f} ({band['change_low']:+.4f} to {band['change_high']:+.4f})"
        name = f"{band['start']}-{band['end'] - 1}"
        lines.append(f"{name:<14}{band['before']:>9.4f}{band['after']:>9.4f}{interval:>30}")
    return "\n".join([*lines, f"nats per token over {answer['documents']} held-out documents"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison of two exported models as a table on stderr and as JSON on stdout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", type=Path, metavar="TOKENS", help="artefact of stage tokenize")
    parser.add_argument("before", type=Path, help="model before the extension (a Hugging Face folder)")
    parser.add_argument("after", type=Path, help="model after it")
    parser.add_argument("--old", type=int, default=256, help="old context in tokens")
    parser.add_argument("--new", type=int, default=512, help="new context in tokens")
    options = parser.parse_args(arguments)
    answer = measure(options.tokens, options.before, options.after, (options.old, options.new))
    sys.stderr.write(table(answer) + "\n")
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
