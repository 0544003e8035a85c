"""From features to figures, each with its number of images and what real images score; and `results.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.features import Extracted
from hf_ddpm.evaluation.frechet import Moments, frechet_distance
from hf_ddpm.evaluation.inception_score import inception_score
from hf_ddpm.evaluation.kernel import kernel_distance, squared_mmd
from hf_ddpm.evaluation.precision_recall import precision_recall
from hf_ddpm.utils.files import write_text
from hf_ddpm.utils.jsonl import to_json

# Blocks of the kernel distance, as is usual; from fewer images than two of them it is taken over all pairs.
KERNEL_BLOCK = 1000
SPLITS = 10
NEIGHBORS = 3
# Shuffles and draws of the metrics, the same for all models: the floor is to be one number.
METRIC_SEED = 0


@dataclass(frozen=True)
class Sets:
    """Features of the sets that are compared.

    Attributes:
        generated: Of `n` generated images.
        reference: Of all real images that they are measured by, shape `(m, D)`.
            None if there are only `stats`.
        held_out: Of `n` other real images, shape `(n, D)`; None for no floor.
        stats: What the Frechet distance is measured by instead of `reference`, if it is given.
    """

    generated: Extracted
    reference: Tensor | None = None
    held_out: Tensor | None = None
    stats: Moments | None = None


def figures(metric: str, sets: Sets) -> dict[str, Any]:
    """Returns the figures of a metric, `fd`, `kid`, `is` or `pr`; `floor` is what the held-out images score."""
    count = len(sets.generated.features)
    report: dict[str, Any] = {"num_images": count}
    if metric == "is":
        splits = min(SPLITS, count)
        assert sets.generated.probabilities is not None
        mean, deviation = inception_score(sets.generated.probabilities, splits=splits, seed=METRIC_SEED)
        return {"value": mean, "standard_deviation": deviation, "splits": splits, **report}
    report = _measure(metric, sets.generated.features, sets) | report
    if sets.held_out is not None:
        floor = _measure(metric, sets.held_out, sets)
        names = ("precision", "recall") if metric == "pr" else ("value",)
        report |= {"floor" if name == "value" else f"held_out_{name}": floor[name] for name in names}
    return report


def scalars(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns figures by metric without their lists and without what they were made by."""
    return {
        name: {key: value for key, value in figure.items() if not isinstance(value, list | dict)}
        for name, figure in figures.items()
    }


def summary(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns figures in one line."""
    parts = []
    for name, figure in figures.items():
        if "value" in figure:
            floor = f" (floor {figure['floor']:.4g})" if "floor" in figure else ""
            parts.append(f"{name} {figure['value']:.4g}{floor}")
        elif name == "pr":
            parts.append(f"precision {figure['precision']:.3f}, recall {figure['recall']:.3f}")
        elif name == "nll":
            parts.append(f"nll {figure['total_bpd']:.4g} bits/dim")
    return ", ".join(parts)


def read_results(path: Path) -> dict[str, Any]:
    """Returns the results in a file, none if there is no file; a `ValueError` if it holds something else."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"output={str(path)!r} is not allowed: what is there is no results.json ({error})") from error
    model = results.get("model") if isinstance(results, dict) else None
    if results != {} and not (isinstance(model, dict) and "checksum" in model):
        raise ValueError(f"output={str(path)!r} is not allowed: what is there is no results.json")
    return dict(results)


def record(path: Path, model: Mapping[str, Any], entries: Mapping[str, Any]) -> bool:
    """Puts entries into a file of results, beside those of other names of the same model.

    Args:
        path: The file.
        model: `name` and `checksum` of the model; a model is the same if its checksum is.
        entries: The new ones.

    Returns:
        Whether there were results of another model, which are gone.
    """
    there = read_results(path)
    is_other = bool(there) and there.get("model", {}).get("checksum") != model["checksum"]
    results = {
        "model": dict(model),
        **({} if is_other else {k: v for k, v in there.items() if k != "model"}),
        **entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(results, indent=2) + "\n")
    return is_other


def _measure(metric: str, features: Tensor, sets: Sets) -> dict[str, Any]:
    if metric == "fd" and sets.stats is not None:
        return {"value": frechet_distance(Moments.of(features), sets.stats)}
    assert sets.reference is not None
    measure = {"fd": _frechet, "kid": _kernel, "pr": _precision_recall}[metric]
    return measure(features, sets.reference)


def _frechet(features: Tensor, reference: Tensor) -> dict[str, Any]:
    value = frechet_distance(Moments.of(features), Moments.of(reference))
    return {"value": value, "reference_images": len(reference)}


def _kernel(features: Tensor, reference: Tensor) -> dict[str, Any]:
    if min(len(features), len(reference)) < 2 * KERNEL_BLOCK:
        return {"value": squared_mmd(features, reference), "reference_images": len(reference)}
    mean, error = kernel_distance(features, reference, block_size=KERNEL_BLOCK, seed=METRIC_SEED)
    return {"value": mean, "standard_error": error, "block_size": KERNEL_BLOCK, "reference_images": len(reference)}


def _precision_recall(features: Tensor, reference: Tensor) -> dict[str, Any]:
    # Both depend on the numbers of images: as many real as generated ones, drawn at random, since sets may be sorted.
    drawn = reference[torch.tensor(choose(len(reference), len(features), METRIC_SEED), device=reference.device)]
    precision, recall = precision_recall(features, drawn, k=NEIGHBORS)
    return {"precision": precision, "recall": recall, "k": NEIGHBORS, "reference_images": len(drawn)}
