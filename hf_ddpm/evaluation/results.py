"""Figures computed from features, and `results.json`, the file that records them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.features import Extracted, Extractor
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

# Entries of a file of results by the name of the metric.
Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RealFeatures:
    """Features of the real images that generated ones are measured by.

    Attributes:
        extractor: What they were extracted with.
        count: Number `n` of generated images to compare.
        reference: Of all images of the reference split, shape `(m, D)`; None if there are only `stats`.
        held_out: Of `n` held-out images, shape `(n, D)`; None for no floor.
        stats: What the Frechet distance is measured by instead of `reference`, if it is given.
        made_by: Data set and extractor, for the record.
    """

    extractor: Extractor
    count: int
    reference: Tensor | None
    held_out: Tensor | None = None
    stats: Moments | None = None
    made_by: dict[str, Any] = field(default_factory=dict)


def figures(metric: str, generated: Extracted, real: RealFeatures) -> dict[str, Any]:
    """Compute `fd`, `kid`, `is` or `pr` of generated images; `floor` is what the held-out images score.

    Args:
        metric: Which.
        generated: What was extracted from `n` generated images.
        real: What to compare with.

    Returns:
        The figures by name, with numbers of images.
    """
    count = len(generated.features)
    report: dict[str, Any] = {"num_images": count}
    if metric == "is":
        splits = min(SPLITS, count)
        assert generated.probabilities is not None
        mean, deviation = inception_score(generated.probabilities, splits=splits, seed=METRIC_SEED)
        return {"value": mean, "standard_deviation": deviation, "splits": splits, **report}
    report = _measure(metric, generated.features, real) | report
    if real.held_out is not None:
        floor = _measure(metric, real.held_out, real)
        names = ("precision", "recall") if metric == "pr" else ("value",)
        report |= {"floor" if name == "value" else f"held_out_{name}": floor[name] for name in names}
    return report


def _measure(metric: str, features: Tensor, real: RealFeatures) -> dict[str, Any]:
    """Return a distance of features to those of real images, in the setting that is usual for it."""
    reference = real.reference
    if metric == "fd" and real.stats is not None:
        return {"value": frechet_distance(Moments.of(features), real.stats)}
    assert reference is not None
    if metric == "fd":
        figure: dict[str, Any] = {"value": frechet_distance(Moments.of(features), Moments.of(reference))}
    elif metric == "kid" and min(len(features), len(reference)) < 2 * KERNEL_BLOCK:
        figure = {"value": squared_mmd(features, reference)}
    elif metric == "kid":
        mean, error = kernel_distance(features, reference, block_size=KERNEL_BLOCK, seed=METRIC_SEED)
        figure = {"value": mean, "standard_error": error, "block_size": KERNEL_BLOCK}
    else:
        # Both depend on the numbers of images: as many real as generated ones, drawn at random, as sets may be sorted.
        drawn = torch.tensor(choose(len(reference), len(features), METRIC_SEED), device=reference.device)
        reference = reference[drawn]
        precision, recall = precision_recall(features, reference, k=NEIGHBORS)
        figure = {"precision": precision, "recall": recall, "k": NEIGHBORS}
    return figure | {"reference_images": len(reference)}


def scalars(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return figures by metric without their lists and without what they were made by."""
    return {
        name: {key: value for key, value in figure.items() if not isinstance(value, list | dict)}
        for name, figure in figures.items()
    }


def summary(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return figures in one line."""
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
    """Return the results in a file, none if there is no file; a `ValueError` if it holds something else."""
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


@dataclass
class Record:
    """Figures of a model, each written as soon as it is known; the file keeps earlier figures of the same model.

    Attributes:
        path: The file.
        model: `name` and `checksum` of the model. Results of a model with another checksum are dropped.
        made_by: What all figures are made by.
        on_figures: Called with the entry of each metric.
        log: Called with a line if results of another model were dropped.
        figures: The entries added.
    """

    path: Path
    model: dict[str, Any]
    made_by: dict[str, Any] = field(default_factory=dict)
    on_figures: Callable[[Figures], object] | None = None
    log: Callable[[str], object] = lambda line: None
    figures: Figures = field(default_factory=dict)

    def add(self, name: str, figure: dict[str, Any]) -> None:
        """Add the figures of a metric; what they alone are `made_by` is put behind what all are."""
        entry = {name: figure | {"made_by": self.made_by | figure.get("made_by", {})}}
        existing = read_results(self.path)
        if existing and existing["model"]["checksum"] != self.model["checksum"]:
            existing = {}
            self.log(f"{self.path} held results of another model: they are gone")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, to_json({**existing, "model": self.model, **entry}, indent=2) + "\n")
        self.figures |= entry
        if self.on_figures is not None:
            self.on_figures(entry)
