"""How load-balance groups change what experts specialise in.

``python -m components.pretraining.studies.specialisation TOKENS OUT`` trains the nano model several times on the
tokenize artefact TOKENS, alike but for the groups, and writes ``specialisation.png`` (heat maps, domain by expert) and
``specialisation.json`` into OUT. A finished variant is not trained again.

Specialisation of a layer is the mutual information, in bits, between the domain of a token and the expert chosen for
it, domains weighted alike: 0 when every domain uses the experts alike, at most log2 of the number of domains.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.artifacts import StageContext, write_json
from components.pretraining.config import PretrainConfig
from components.pretraining.presets import pretrain_config_nano

STAGE = "stage3"
_BATCH, _CONTEXT, _MICRO_BATCH = 32, 256, 4

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "no balance loss": {"load_balance_coef": 0.0},
    "micro-batches": {"load_balance_groups": _BATCH // _MICRO_BATCH},
    "one global group": {"load_balance_groups": 1},
    "groups by domain": {"load_balance_groups": _BATCH // _MICRO_BATCH, "load_balance_domains": "sharded"},
}


def mutual_information_bits(frequency_CE: npt.NDArray[np.float64]) -> float:
    """Mutual information of domain and expert in one layer.

    Args:
        frequency_CE: share of a domain's tokens that choose each expert (rows sum to K).
    """
    p_CE = frequency_CE / frequency_CE.sum(axis=1, keepdims=True)
    mean_E = p_CE.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p_CE > 0, p_CE * np.log2(p_CE / mean_E), 0.0)
    return float(terms.sum(axis=1).mean())


def specialisation_bits(by_category: Mapping[str, Sequence[Sequence[float]]]) -> float:
    """Mean over layers of :func:`mutual_information_bits`.

    Args:
        by_category: ``activation_stats.json``'s table: expert frequencies ``[L, E]`` of every category.
    """
    frequency_CLE = np.array(list(by_category.values()), dtype=np.float64)
    return float(np.mean([mutual_information_bits(layer_CE) for layer_CE in frequency_CLE.swapaxes(0, 1)]))


def variant_config(values: Mapping[str, Any], tokens: int, coefficient: float) -> PretrainConfig:
    """The nano recipe on ``tokens`` tokens in three equal training stages of one mixture, with a variant's values."""
    nano = pretrain_config_nano()
    stage = {
        **nano.stages[1].model_dump(),
        "tokens": tokens // 3,
        "context": _CONTEXT,
        "sequences_per_step": _BATCH,
    }
    return PretrainConfig.model_validate(
        {
            **nano.model_dump(),
            "stages": [stage, stage, stage],
            "optimizer": {**nano.optimizer.model_dump(), "warmup_steps": 10},
            "load_balance_coef": coefficient,
            "sequences_per_micro_batch": _MICRO_BATCH,
            "log_every_steps": 5,
            **values,
        }
    )


def study(tokens_folder: Path, out: Path, tokens: int, coefficient: float) -> dict[str, Any]:
    """Train every variant that is not finished, and measure.

    Returns:
        By variant: held-out bits per byte, specialisation in bits, the fullest expert's load over the whole batch and
        within groups (1 at balance), and the expert frequencies by domain.
    """
    from components.pretraining.stage import run

    results: dict[str, Any] = {}
    for name, values in VARIANTS.items():
        folder = out / name.replace(" ", "-")
        finished = folder / "activation_stats.json"
        if not finished.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            config = variant_config(values, tokens, coefficient).model_dump(mode="json")
            context = StageContext(
                "pretrain", "nano", config, {"tokenize": tokens_folder}, folder, out / "cache"
            )
            sys.stderr.write(f"training: {name}\n")
            run(context)
            context.close()
        by_category = json.loads(finished.read_text())["by_category"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [line["metrics"] for line in lines if "train/ce" in line["metrics"]][-1]
        results[name] = {
            "bits_per_byte": json.loads((folder / "heldout.json").read_text())[STAGE]["overall"],
            "specialisation_bits": specialisation_bits(by_category),
            "load_max": last["router/load_max"],
            "load_max_group": last["router/load_max_group"],
            "by_category": by_category,
        }
    return results


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Heat maps: a row per variant, a column per layer; domains down, experts across, sorted by their first domain."""
    from matplotlib.figure import Figure

    from components.measures.figures import save_figure

    first = next(iter(results.values()))["by_category"]
    domains = list(first)
    layers = _spread(len(next(iter(first.values()))), 4)
    figure = Figure(figsize=(2.6 * len(layers) + 1.5, 1.7 * len(results) + 0.6), layout="constrained")
    axes = figure.subplots(len(results), len(layers), squeeze=False)
    image = None
    for row, (name, result) in zip(axes, results.items(), strict=True):
        frequency_CLE = np.array(list(result["by_category"].values()), dtype=np.float64)
        for place, layer in zip(row, layers, strict=True):
            frequency_CE = frequency_CLE[:, layer]
            load_CE = frequency_CE / frequency_CE.sum(axis=1, keepdims=True) * frequency_CE.shape[1]
            order_E = np.lexsort((-load_CE.max(axis=0), load_CE.argmax(axis=0)))
            shown_CE = np.log2(np.maximum(load_CE[:, order_E], 2.0**-4))
            image = place.imshow(shown_CE, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
            place.set_xticks([])
            place.set_yticks(range(len(domains)), domains if layer == layers[0] else [], fontsize=7)
            bits = mutual_information_bits(frequency_CE)
            place.set_title(f"layer {layer}: {bits:.3f} bits", fontsize=8)
        row[0].set_ylabel(name, fontsize=8)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("use of an expert by a domain, 1 at balance", fontsize=8)
    save_figure(figure, out)


def _spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``range(count)``, evenly, first and last included."""
    if count <= wanted:
        return list(range(count))
    return [math.floor(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def table(results: Mapping[str, Any]) -> str:
    """The measurements as text."""
    lines = [f"{'variant':<18}{'bits/byte':>10}{'specialisation':>16}{'fullest':>9}{'in group':>10}"]
    for name, result in results.items():
        lines.append(
            f"{name:<18}{result['bits_per_byte']:>10.4f}{result['specialisation_bits']:>11.4f} bits"
            f"{result['load_max']:>9.2f}{result['load_max_group']:>10.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens_folder", type=Path, metavar="TOKENS", help="artefact of stage tokenize")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for trainings and results")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="training tokens of each variant")
    parser.add_argument("--coef", type=float, default=0.0075, help="weight of each layer's load-balance loss")
    options = parser.parse_args(arguments)
    results = study(options.tokens_folder, options.out, options.tokens, options.coef)
    write_json(options.out / "specialisation.json", results)
    draw(results, options.out / "specialisation.png")
    sys.stdout.write(table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
