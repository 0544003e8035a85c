"""Metrics computed from features, and the results file `results.json`."""

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

# Usual block size of the kernel distance; with fewer than two blocks, it is computed from all pairs.
KERNEL_BLOCK = 1000
SPLITS = 10
NEIGHBORS = 3
# Seed for shuffling and selecting images, fixed so that the floor is the same for all models.
METRIC_SEED = 0

# Entries of a results file by metric.
Metrics = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class RealFeatures:
    """Features of the real images to compare with.

    Attributes:
        extractor: The feature extractor.
        count: Number `n` of generated images to compare.
        reference: Features of the reference split, shape `(m, D)`; None if only `stats` are given.
        held_out: Features of `n` held-out images, shape `(n, D)`; None for no floor.
        stats: Moments for the Frechet distance, used instead of `reference` if given.
        made_by: Dataset and extractor, for the results file.
    """

    extractor: Extractor
    count: int
    reference: Tensor | None
    held_out: Tensor | None = None
    stats: Moments | None = None
    made_by: dict[str, Any] = field(default_factory=dict)


def compute_metric(metric: str, generated: Extracted, real: RealFeatures) -> dict[str, Any]:
    """Compute a metric of generated images.

    Args:
        metric: `fd`, `kid`, `is` or `pr`.
        generated: Features of `n` generated images.
        real: Features of the real images to compare with.

    Returns:
        The values by name, with the numbers of images. `floor` and `held_out_*` are the values of held-out images.
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
    """Return the values of `fd`, `kid` or `pr`, with the usual settings of the metric."""
    reference = real.reference
    if metric == "fd" and real.stats is not None:
        return {"value": frechet_distance(Moments.of(features), real.stats)}
    assert reference is not None
    if metric == "fd":
        values: dict[str, Any] = {"value": frechet_distance(Moments.of(features), Moments.of(reference))}
    elif metric == "kid" and min(len(features), len(reference)) < 2 * KERNEL_BLOCK:
        values = {"value": squared_mmd(features, reference)}
    elif metric == "kid":
        mean, error = kernel_distance(features, reference, block_size=KERNEL_BLOCK, seed=METRIC_SEED)
        values = {"value": mean, "standard_error": error, "block_size": KERNEL_BLOCK}
    else:
        # Precision and recall depend on the numbers of images: select as many real as generated images, at random since
        # the images may be sorted.
        indices = torch.tensor(choose(len(reference), len(features), METRIC_SEED), device=reference.device)
        reference = reference[indices]
        precision, recall = precision_recall(features, reference, k=NEIGHBORS)
        values = {"precision": precision, "recall": recall, "k": NEIGHBORS}
    return values | {"reference_images": len(reference)}


def scalars(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the results by metric, without lists and without `made_by`."""
    return {
        name: {key: value for key, value in values.items() if not isinstance(value, list | dict)}
        for name, values in metrics.items()
    }


def summary(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a one-line summary of results."""
    parts = []
    for name, values in metrics.items():
        if "value" in values:
            floor = f" (floor {values['floor']:.4g})" if "floor" in values else ""
            parts.append(f"{name} {values['value']:.4g}{floor}")
        elif name == "pr":
            parts.append(f"precision {values['precision']:.3f}, recall {values['recall']:.3f}")
        elif name == "nll":
            parts.append(f"nll {values['total_bpd']:.4g} bits/dim")
    return ", ".join(parts)


def read_results(path: Path) -> dict[str, Any]:
    """Return the results in a file, empty if the file is missing; raise a `ValueError` if it is not a results file."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a results file ({error}); move it, or choose another path") from error
    model = results.get("model") if isinstance(results, dict) else None
    if results != {} and not (isinstance(model, dict) and "checksum" in model):
        raise ValueError(f"{path}: not a results file; move it, or choose another path")
    return dict(results)


@dataclass
class Record:
    """Results file of a model, updated after each metric; earlier results of the same model are kept.

    Attributes:
        path: The file.
        model: `name` and `checksum` of the model. Results of a model with another checksum are deleted.
        made_by: Settings shared by all metrics.
        on_metric: Called with the entry of each metric.
        log: Called with a line if results of another model were deleted.
        metrics: The new entries.
    """

    path: Path
    model: dict[str, Any]
    made_by: dict[str, Any] = field(default_factory=dict)
    on_metric: Callable[[Metrics], object] | None = None
    log: Callable[[str], object] = lambda line: None
    metrics: Metrics = field(default_factory=dict)

    def add(self, name: str, values: dict[str, Any]) -> None:
        """Add the results of a metric; its own `made_by` settings are added to the shared ones."""
        entry = {name: values | {"made_by": self.made_by | values.get("made_by", {})}}
        existing = read_results(self.path)
        if existing and existing["model"]["checksum"] != self.model["checksum"]:
            existing = {}
            self.log(f"{self.path}: replaced the results of another model")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, to_json({**existing, "model": self.model, **entry}, indent=2) + "\n")
        self.metrics |= entry
        if self.on_metric is not None:
            self.on_metric(entry)
