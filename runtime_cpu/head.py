"""What a file's predictor of output rows loses on text: ``python -m runtime_cpu.head MODEL TEXT --positions 2048``.

    result = measure(engine, token_ids, [-2.0, 0.0])      # an engine opened with head="predictor"
    result[0].missed_argmax, result[0].row_share

Every position's exact logits are computed, and the predictor's scores, so that any number of thresholds costs the same
two passes. The text is cut into windows as ``runtime_cpu.perplexity`` cuts it. A threshold is written into the file
when it is made (``python -m runtime_cpu.pack --head-threshold``); others are measured here without being set.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import Engine, EngineError
from runtime_cpu.options import add_kv_option
from runtime_cpu.perplexity import read_tokens
from runtime_cpu.tokenizer import TokenizerError

LEAST_ROWS = (
    64  # kLeastHeadRows of csrc/forward/head.hpp: fewer named rows than these, and the whole head is computed
)
_WINDOW = 256  # the logits and scores of one window are in memory: 0.3 GB for 151,936 rows
_ROWS = 32  # positions that are compared at once


@dataclass(frozen=True)
class HeadLoss:
    """One threshold's outcome. Shares are of ``positions`` unless said otherwise.

    Attributes:
        row_share: mean share of the head's rows that are computed; positions that fall back count with all rows, as in
            ``stats.head_row_share``.
        missed_argmax: whose most probable token is not computed, with ``missed_argmax_low`` and ``_high``, the 95 %
            interval (Wilson 1927) as if positions were independent.
        lost_mass: mean probability of the rows that are not computed.
        fallbacks: positions for which fewer than 64 rows were named, so that the whole head is computed.
    """

    threshold: float
    positions: int
    row_share: float
    missed_argmax: float
    missed_argmax_low: float
    missed_argmax_high: float
    lost_mass: float
    fallbacks: int


def measure(
    engine: Engine,
    token_ids: Sequence[int] | NDArray[np.integer],
    thresholds: Sequence[float] | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[HeadLoss]:
    """Compare what each threshold names with the exact logits after every one of ``token_ids`` [T].

    Args:
        engine: opened with ``head="predictor"``; nobody else should use it meanwhile.
        thresholds: by default the file's own.
        window: tokens that are computed together and see each other (default 256, or the context).

    Raises:
        ValueError: no tokens, a window outside 1 … context, or an engine with the exact head.
    """
    ids = np.asarray(token_ids)
    predictor = engine.info.head_predictor
    if engine.info.head != "predictor" or predictor is None:
        raise ValueError("the engine computes the exact head; open it with head='predictor'")
    window = min(_WINDOW, engine.info.context) if window is None else window
    if not 1 <= window <= engine.info.context:
        raise ValueError(f"window is {window}; allowed is 1 to the context, {engine.info.context}")
    if ids.ndim != 1 or not ids.size:
        raise ValueError("there are no tokens to measure on")
    wanted = [predictor.threshold] if thresholds is None else list(thresholds)
    sums = np.zeros((len(wanted), 4))  # rows computed, argmaxes missed, mass lost, fallbacks
    starts = range(0, len(ids), window)
    for done, start in enumerate(starts, 1):
        part = ids[start : start + window]
        with engine.head_rows("all"):
            exact = engine.logits(part)
        with engine.head_rows("scores"):
            scores = engine.logits(part)
        for at in range(0, len(part), _ROWS):
            rows = slice(at, at + _ROWS)
            sums += [_compare(exact[rows], scores[rows], threshold) for threshold in wanted]
        if progress is not None:
            progress(done, len(starts))
    return [
        _loss(threshold, len(ids), *total) for threshold, total in zip(wanted, sums.tolist(), strict=True)
    ]


def _compare(
    exact: NDArray[np.float32], scores: NDArray[np.float32], threshold: float
) -> tuple[float, float, float, float]:
    """Sums over positions, in the order of :func:`_loss`."""
    named = scores > np.float32(threshold)
    whole = named.sum(axis=1) < min(LEAST_ROWS, named.shape[1])
    named[whole] = True
    missed = ~named[np.arange(len(named)), exact.argmax(axis=1)]
    odds = np.exp(exact.astype(np.float64) - exact.max(axis=1, keepdims=True))
    mass = np.where(named, 0.0, odds).sum(axis=1) / odds.sum(axis=1)
    return float(named.mean(axis=1).sum()), float(missed.sum()), float(mass.sum()), float(whole.sum())


def _loss(
    threshold: float, positions: int, computed: float, missed: float, mass: float, fallbacks: float
) -> HeadLoss:
    low, high = wilson(round(missed), positions)
    return HeadLoss(
        threshold,
        positions,
        computed / positions,
        missed / positions,
        low,
        high,
        mass / positions,
        round(fallbacks),
    )


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share = hits / trials
    centre = share + z * z / (2 * trials)
    width = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def table(losses: Sequence[HeadLoss]) -> str:
    """The outcome for people."""
    lines = [
        f"{losses[0].positions} positions",
        f"{'threshold':>10} {'rows computed':>14} {'argmax missed (95 %)':>24} {'probability lost':>17} "
        f"{'fallbacks':>10}",
    ]
    for loss in losses:
        missed = f"{loss.missed_argmax:.2%} ({loss.missed_argmax_low:.2%}-{loss.missed_argmax_high:.2%})"
        lines.append(
            f"{loss.threshold:>10.4g} {loss.row_share:>14.2%} {missed:>24} {loss.lost_mass:>17.3%} "
            f"{loss.fallbacks:>10}"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 2: the model or the input is unusable."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime_cpu.head", description="Measure what a predicted head loses on text."
    )
    parser.add_argument("model", type=Path, help="GGUF file with a predictor of its head's rows")
    parser.add_argument("input", type=Path, help="UTF-8 text, or token ids in .npy or .ds")
    parser.add_argument(
        "--positions", type=int, default=2048, help="tokens from the front of it (default: %(default)s)"
    )
    parser.add_argument("--window", type=int, help=f"tokens per window (default: {_WINDOW} or the context)")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", metavar="SCORE", help="others than the file's, such as -4 -2 0"
    )
    parser.add_argument("--threads", type=int)
    add_kv_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        if options.positions < 1:
            raise ValueError(f"--positions is {options.positions}; allowed is 1 and more")
        if not all(map(math.isfinite, options.thresholds or ())):
            raise ValueError(f"--thresholds are {options.thresholds}; allowed are finite numbers")
        with Engine.open(
            options.model, options.threads, kv_type=options.kv, sessions=1, head="predictor"
        ) as engine:
            ids = read_tokens(options.input, engine.tokenizer)[: options.positions]
            losses = measure(engine, ids, options.thresholds, options.window, _show_progress)
    except (OSError, EngineError, TokenizerError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(json.dumps([asdict(loss) for loss in losses]) + "\n" if options.json else table(losses))
    return 0


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\rwindow {done} of {total}" + ("\n" if done == total else ""))


if __name__ == "__main__":
    sys.exit(main())
