"""Can most rows of the output matrix be left unread? ``python -m components.export.head_study MODEL TEXT... --out F``.

A screen estimates every logit from few bytes per row, and knows the size of its error; only rows that may
still reach the greatest logit are read and computed. On real states of a Hugging Face model this measures how many
rows survive, how often the greatest logit is lost, and the bytes read against the whole matrix in Q4_0.

Screens (rows w, states s, m their mean; all means and covariances are of text that is not tested):
    sign       one bit per column of w and its norm, as RaBitQ (Gao & Long 2024); with a random rotation of both, and
               with the means of rows and states taken out first, whose products are known exactly
    low rank   the leading directions of the matrix (SVD), or of the matrix weighted by the states' covariance
    both       weighted low rank, and the signs of what is left of the weighted rows
    two bits   the upper two bits of each Q4_0 weight with its scales: no further copy of the matrix
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.export.head_states import TILE_ROWS, collect_states, head_weight, split_windows, text_streams
from components.measures.intervals import wilson_interval

Floats = npt.NDArray[np.floating[Any]]
BYTES_PER_WEIGHT = 18 / 32  # Q4_0
_LEADERS = 64  # rows of the greatest estimates, computed first: the greatest of their logits is the threshold
_CHUNK = 64


@dataclass(frozen=True)
class Screen:
    """One way to estimate logits.

    Attributes:
        estimate: states ``[n, D]`` to estimates ``[n, V]`` and their standard errors, broadcastable to that.
        row_bytes: read per row.
        bound: whether the second result is a rigorous bound of the error instead.
    """

    name: str
    estimate: Callable[[Floats], tuple[Floats, Floats]]
    row_bytes: float
    bound: bool = False


def _norm(rows: Floats) -> Floats:
    result: Floats = np.linalg.norm(rows, axis=-1)
    return result


def _rotation(size: int, seed: int) -> Floats:
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    rotation: Floats = (q * np.sign(np.diag(r))).astype(np.float32)
    return rotation


def _q4_0(rows: Floats) -> tuple[Floats, Floats]:
    """Nibbles ``[V, blocks, 32]`` and scales ``[V, blocks, 1]`` as Q4_0 chooses them."""
    blocks = rows.reshape(len(rows), -1, 32)
    scales = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], 2) / -8
    nibbles = np.clip(np.round(blocks / np.where(scales == 0, 1, scales)) + 8, 0, 15)
    return nibbles, scales


def _sign_code(rows: Floats) -> tuple[Floats, Floats, Floats]:
    """Unit codes ``[V, D]``, cosine of each row with its code, and norms."""
    norms = _norm(rows)
    codes = np.where(rows >= 0, 1, -1).astype(np.float32) / np.float32(math.sqrt(rows.shape[1]))
    return codes, np.einsum("vd,vd->v", rows, codes) / np.maximum(norms, 1e-12), norms


def _sign_screen(
    name: str, head: Floats, row_mean: Floats, state_mean: Floats, rotation: Floats | None, bound: bool
) -> Screen:
    rows = head - row_mean
    codes, cosines, norms = _sign_code(rows if rotation is None else rows @ rotation.T)
    known = rows @ state_mean
    size = head.shape[1]
    spread = np.sqrt(1 - cosines**2)

    def estimate(states: Floats) -> tuple[Floats, Floats]:
        rest = states - state_mean
        products = (rest if rotation is None else rest @ rotation.T) @ codes.T
        base = known + (states @ row_mean)[:, None]
        if bound:  # w = norm * (cosine * code + spread * e), e at a right angle to the code
            beyond = np.sqrt(np.maximum(_norm(rest)[:, None] ** 2 - products**2, 0))
            return base + norms * cosines * products, norms * spread * beyond
        error = norms * spread / cosines * (_norm(rest)[:, None] / np.float32(math.sqrt(size - 1)))
        return base + norms / cosines * products, error

    centred = bool(np.any(row_mean))
    return Screen(name, estimate, size / 8 + (6 if centred else 4), bound)


def _svd_screen(head: Floats, rank: int, bound: bool) -> Screen:
    _, vectors = np.linalg.eigh(head.T @ head)
    basis = vectors[:, ::-1][:, :rank].astype(np.float32)
    factors = head @ basis
    left = np.sqrt(np.maximum(_norm(head) ** 2 - _norm(factors) ** 2, 0))

    def estimate(states: Floats) -> tuple[Floats, Floats]:
        inner = states @ basis
        beyond = np.sqrt(np.maximum(_norm(states) ** 2 - _norm(inner) ** 2, 0))[:, None]
        return inner @ factors.T, left * beyond / (1 if bound else math.sqrt(head.shape[1] - rank))

    return Screen(f"SVD {rank}" + (", Cauchy-Schwarz" if bound else ""), estimate, rank + 2, bound)


def _weighted_screen(head: Floats, fit: Floats, rank: int, signs: bool, seed: int) -> Screen:
    """Rows and states are brought to a basis in which states are isotropic; there the SVD is the best there is."""
    mean = fit.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(fit, rowvar=False))
    scales = np.sqrt(np.maximum(values, 1e-6 * values[-1]))
    to_rows = (vectors * scales).astype(np.float32)
    to_states = (vectors / scales).astype(np.float32)
    rows = head @ to_rows
    _, turned = np.linalg.eigh(rows.T @ rows)
    basis = turned[:, ::-1].astype(np.float32)
    rows, to_states = rows @ basis, to_states @ basis
    known, size = head @ mean, head.shape[1]
    factors, rest = rows[:, :rank], rows[:, rank:]
    if not signs:
        left = _norm(rest) ** 2
        if rank % 32:  # 8 bits per factor, whose rounding is too small to count
            return Screen(
                f"weighted {rank}, 8 bits",
                lambda states: (
                    known + ((states - mean) @ to_states[:, :rank]) @ factors.T,
                    np.sqrt(left)[None],
                ),
                rank + 4,
            )
        nibbles, steps = _q4_0(factors)
        rounded = ((nibbles - 8) * steps).reshape(factors.shape).astype(np.float32)
        variances = (steps[..., 0] ** 2 / 12).astype(np.float32)

        def rough(states: Floats) -> tuple[Floats, Floats]:
            inner = (states - mean) @ to_states[:, :rank]
            energy = (inner.reshape(len(states), -1, 32) ** 2).sum(axis=2)
            return known + inner @ rounded.T, np.sqrt(left + energy @ variances.T)

        return Screen(f"weighted {rank}, Q4_0", rough, rank * BYTES_PER_WEIGHT + 4)
    rotation = _rotation(size - rank, seed)
    codes, cosines, norms = _sign_code(rest @ rotation.T)

    def estimate(states: Floats) -> tuple[Floats, Floats]:
        inner = (states - mean) @ to_states
        beyond = inner[:, rank:] @ rotation.T
        error = norms * np.sqrt(1 - cosines**2) / cosines * (_norm(beyond)[:, None] / math.sqrt(size - rank))
        return known + inner[:, :rank] @ factors.T + norms / cosines * (beyond @ codes.T), error

    return Screen(f"weighted {rank} + signs", estimate, rank + (size - rank) / 8 + 6)


def _two_bit_screen(head: Floats) -> Screen:
    nibbles, scales = _q4_0(head)
    upper = ((nibbles // 4 * 4 + 1.5 - 8) * scales).reshape(head.shape).astype(np.float32)
    variances = (1.25 * scales[..., 0] ** 2).astype(np.float32)

    def estimate(states: Floats) -> tuple[Floats, Floats]:
        energy = (states.reshape(len(states), -1, 32) ** 2).sum(axis=2)
        return states @ upper.T, np.sqrt(energy @ variances.T)

    size = head.shape[1]
    return Screen("upper two bits", estimate, size / 4 + 2 * size / 32)


def screens(head: Floats, fit: Floats, seed: int = 0) -> Iterator[Screen]:
    """Every screen of the study, one at a time: each may hold a copy of the matrix."""
    size = head.shape[1]
    nothing, row_mean, state_mean = np.zeros(size, np.float32), head.mean(axis=0), fit.mean(axis=0)
    rotation = _rotation(size, seed)
    yield _sign_screen("sign", head, nothing, nothing, None, False)
    yield _sign_screen("sign, rotated", head, nothing, nothing, rotation, False)
    yield _sign_screen("sign, rotated, centred", head, row_mean, state_mean, rotation, False)
    yield _sign_screen("sign, rotated, centred, Cauchy-Schwarz", head, row_mean, state_mean, rotation, True)
    ranks = [rank for rank in (16, 32, 64, 128, 256) if rank < size]
    for rank in ranks:
        yield _svd_screen(head, rank, False)
    yield _svd_screen(head, ranks[-1], True)
    for rank in ranks:
        yield _weighted_screen(head, fit, rank, False, seed)
    for rank in [rank for rank in ranks if 32 <= rank <= 64]:
        yield _weighted_screen(head, fit, rank, True, seed)
    yield _two_bit_screen(head)


def _nucleus(ordered: Floats, mass: float) -> int:
    """Logits to keep of a descending row so that their probabilities reach ``mass``."""
    shares = np.exp(ordered.astype(np.float64) - float(ordered[0]))
    return int(np.searchsorted(np.cumsum(shares) / shares.sum(), mass)) + 1


def describe(head: Floats, test: Floats) -> dict[str, float]:
    """How peaked the logits are: cosines of the greatest, gap to the next, size of the nucleus."""
    norms, row_mean = _norm(head), head.mean(axis=0)
    centred = head - row_mean
    cosines, turned, gaps, nuclei = [], [], [], []
    for start in range(0, len(test), _CHUNK):
        states = test[start : start + _CHUNK]
        logits = states @ head.T
        best = logits.argmax(axis=1)
        lengths = _norm(states)
        cosines += (logits[np.arange(len(states)), best] / (norms[best] * lengths)).tolist()
        turned += (np.einsum("nd,nd->n", centred[best], states) / (_norm(centred[best]) * lengths)).tolist()
        ordered = -np.sort(-logits, axis=1)
        gaps += (ordered[:, 0] - ordered[:, 1]).tolist()
        nuclei += [_nucleus(row, 0.95) for row in ordered]
    result: dict[str, float] = {"positions": len(test), "rows": len(head), "columns": head.shape[1]}
    for name, values in (
        ("cosine", cosines),
        ("cosine_centred_rows", turned),
        ("gap", gaps),
        ("top_p_95_rows", nuclei),
    ):
        for share in (10, 50, 90):
            result[f"{name}_p{share}"] = float(np.percentile(values, share))
    return result


def measure(screen: Screen, head: Floats, test: Floats, factors: Sequence[float]) -> list[dict[str, Any]]:
    """One line per factor of the standard error (of a rigorous bound: one line)."""
    factors = (1.0,) if screen.bound else factors
    keys = ("rows", "tiles", "lost", "top40_lost", "nucleus_lost", "mass_lost", "rows_for_top40")
    sums = {factor: dict.fromkeys(keys, 0.0) for factor in factors}
    for start in range(0, len(test), _CHUNK):
        states = test[start : start + _CHUNK]
        logits = states @ head.T
        estimates, errors = screen.estimate(states)
        leaders = np.argpartition(-estimates, 4 * _LEADERS, axis=1)[:, : 4 * _LEADERS]
        exact = np.take_along_axis(logits, leaders, 1)
        order = np.argsort(-np.take_along_axis(estimates, leaders, 1), axis=1)[:, :_LEADERS]
        bars = np.take_along_axis(exact, order, 1).max(axis=1, keepdims=True)
        bars_40 = -np.sort(-exact, axis=1)[:, 39:40]
        for factor in factors:
            tops = estimates + np.float32(factor) * errors
            alive = tops >= bars
            np.put_along_axis(alive, np.take_along_axis(leaders, order, 1), True, 1)
            counts = sums[factor]
            counts["rows"] += float(alive.mean(axis=1).sum())
            padded = np.pad(alive, ((0, 0), (0, -alive.shape[1] % TILE_ROWS)))
            counts["tiles"] += float(padded.reshape(len(alive), -1, TILE_ROWS).any(axis=2).mean(axis=1).sum())
            counts["rows_for_top40"] += float((tops >= bars_40).mean(axis=1).sum())
            for row, kept in zip(logits, alive, strict=True):
                first = np.argpartition(-row, 2048 if len(row) > 2048 else len(row) - 1)[:2048]
                first = first[np.argsort(-row[first], kind="stable")]
                shares = np.exp(row.astype(np.float64) - float(row[first[0]]))
                total = shares.sum()
                nucleus = first[: int(np.searchsorted(np.cumsum(shares[first]) / total, 0.95)) + 1]
                counts["lost"] += not kept[first[0]]
                counts["top40_lost"] += not kept[first[:40]].all()
                counts["nucleus_lost"] += not kept[nucleus].all()
                counts["mass_lost"] += float(shares[~kept].sum() / total)
    lines = []
    for factor, counts in sums.items():
        trials = len(test)
        shares = {key: value / trials for key, value in counts.items()}
        low, high = wilson_interval(int(counts["lost"]), trials)
        full = head.shape[1] * BYTES_PER_WEIGHT
        lines.append(
            {"screen": screen.name, "factor": None if screen.bound else factor, **shares, "lost_low": low,
             "lost_high": high, "row_bytes": screen.row_bytes,
             "read_by_rows": screen.row_bytes / full + shares["rows"],
             "read_by_tiles": screen.row_bytes / full + shares["tiles"]}
        )  # fmt: skip
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as Markdown."""
    text = [
        "| screen | k | rows | tiles | argmax lost (95 %) | top 40 lost | top-p 0.95 lost | mass lost "
        "| rows for top 40 | bytes, rows / tiles |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        factor = "bound" if line["factor"] is None else f"{line['factor']:g}"
        text.append(
            f"| {line['screen']} | {factor} | {line['rows']:.1%} | {line['tiles']:.1%} | {line['lost']:.2%} "
            f"({line['lost_low']:.2%}-{line['lost_high']:.2%}) | {line['top40_lost']:.1%} | {line['nucleus_lost']:.1%} "
            f"| {line['mass_lost']:.2%} | {line['rows_for_top40']:.1%} "
            f"| {line['read_by_rows']:.0%} / {line['read_by_tiles']:.0%} |"
        )
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    """The command; writes JSON to ``--out`` and the table to standard output."""
    import torch
    from transformers import AutoModelForCausalLM

    import model  # noqa: F401  registers SmallThinker with transformers

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder with tokenizer.json")
    parser.add_argument("text", type=Path, nargs="+", help="UTF-8 text or JSON lines with a text each")
    parser.add_argument("--positions", type=int, default=36_000, help="tokens, of which a third is tested")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--test", type=int, default=2048, help="tested positions, drawn from that third")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    streams = text_streams(options.model, options.text)
    fit_windows, test_windows = split_windows(streams, options.positions, options.window, (2 / 3, 1 / 3))
    network = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    head, fit, test = (
        head_weight(network),
        collect_states(network, fit_windows),
        collect_states(network, test_windows),
    )
    del network
    report = study(head, fit, test, options.test, options.seed)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(json.dumps(report["logits"], indent=1) + "\n" + table(report["screens"]) + "\n")
    return 0


def study(head: Floats, fit: Floats, test: Floats, positions: int, seed: int) -> dict[str, Any]:
    """Every screen on ``positions`` of the test states, drawn without replacement."""
    generator = np.random.default_rng(seed)
    drawn = test[generator.permutation(len(test))[:positions]]
    lines = []
    for screen in screens(head, fit, seed):
        lines += measure(screen, head, drawn, (3.0, 4.0, 5.0, 6.0))
        sys.stderr.write(f"{table(lines[-1:]).splitlines()[-1]}\n")
    return {"logits": describe(head, drawn), "screens": lines}


if __name__ == "__main__":
    sys.exit(main())
