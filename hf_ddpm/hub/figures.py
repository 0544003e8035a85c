"""Table rows and metadata of a model card, from `results.json`."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from hf_ddpm.utils.markdown import escape, plain
from hf_ddpm.utils.public import strip_local_path

# In table order: metric, key of its value in results.json, display name, Hub name, key of the value of real images.
KINDS = (
    ("fd", "value", "Frechet distance", "frechet_distance", "floor"),
    ("kid", "value", "kernel distance", "kernel_distance", "floor"),
    ("is", "value", "Inception score", "inception_score", None),
    ("pr", "precision", "precision", "precision", "held_out_precision"),
    ("pr", "recall", "recall", "recall", "held_out_recall"),
    ("nll", "total_bpd", "bound on the NLL, bits/dim", "bits_per_dim", None),
    ("memorization", "exact_copies", "share of exact copies of training images", "exact_copies", None),
)

# Defaults that the settings column does not show.
DEFAULTS = {"eta": 0, "guidance_scale": 1}


@dataclass(frozen=True)
class Row:
    """One value of a metric.

    Attributes:
        name: Display name.
        type: Name on the Hub.
        value: The value.
        error: Standard error, or standard deviation over splits, as text.
        floor: The value of real images.
        count: Number of images.
        data: Dataset of the real images.
        split: Its split; None for statistics from a file.
        how: Settings, as text.
        arguments: Settings, as metadata for the Hub.
    """

    name: str
    type: str
    value: float
    error: str
    floor: float | None
    count: int
    data: str
    split: str | None
    how: str
    arguments: dict[str, Any]

    @property
    def compared_with(self) -> str:
        """The real images, in Markdown."""
        return escape(f"{self.data}, {self.split}" if self.split else self.data)

    @property
    def made_with(self) -> str:
        """The settings, in Markdown."""
        return escape(self.how)

    def eval_result(self) -> EvalResult:
        """Return the value as metadata of a model card."""
        return EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=self.data,
            dataset_name=self.data,
            dataset_split=self.split,
            metric_type=self.type,
            metric_name=self.name,
            metric_value=self.value,
            metric_args=self.arguments,
        )


def rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of results written by `hf-ddpm evaluate`; skip damaged entries with a warning."""
    for metric, key, name, kind, floor in KINDS:
        if metric not in results:
            continue
        try:
            row = _row(results[metric], metric, key, name, kind, floor)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logging.getLogger(__name__).warning("results: skipped %s, its entry is damaged: %r", metric, error)
            continue
        if row is not None:
            yield row


def _row(entry: Mapping[str, Any], metric: str, key: str, name: str, kind: str, floor: str | None) -> Row | None:
    """Return the row of a value, or None if the origin of the images is unknown."""
    made_by = entry["made_by"]
    if not math.isfinite(entry[key]):
        raise ValueError(f"{key} is {entry[key]}")
    if metric != "nll" and made_by["sampling"] is None:
        return None
    if metric == "nll":
        how, arguments = _bound_settings(entry, made_by)
    else:
        how, arguments = _sampling_settings(made_by, has_features=metric != "memorization")
    estimated = bool(entry.get("is_estimate"))
    error = entry.get("standard_deviation", entry.get("standard_error"))
    data, split = _compared_with(made_by)
    is_fid = metric == "fd" and arguments["extractor"] == "inception"
    return Row(
        name=name + (" (estimate)" if estimated else ""),
        type="fid" if is_fid else kind,
        value=float(entry[key]),
        error="" if error is None else f" ± {error:.2g}",
        floor=None if entry.get(floor) is None else float(entry[floor]),
        count=int(entry["num_images"]),
        data=data,
        split=split,
        how=f"{how}; {made_by['device']}",
        arguments={"num_images": int(entry["num_images"]), **arguments},
    )


def _compared_with(made_by: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the dataset and split of the real images, or the name of their statistics file."""
    if "reference_stats" in made_by:
        return plain(strip_local_path(made_by["reference_stats"]["name"])), None
    dataset = made_by.get("dataset") or {"name": "none"}
    split = dataset.get("reference_split") or dataset.get("split")
    return plain(strip_local_path(dataset["name"], made_by.get("hub_ids", ()))), None if split is None else plain(split)


def _sampling_settings(made_by: Mapping[str, Any], has_features: bool) -> tuple[str, dict[str, Any]]:
    arguments: dict[str, Any] = {}
    parts = []
    if has_features:
        extractor = made_by["extractor"]
        name = plain(strip_local_path(extractor["name"], made_by.get("hub_ids", ())))
        arguments |= {"extractor": name, "extractor_sha256": extractor["checksum"]}
        parts.append(f"{arguments['extractor']} features")
    keys = ("scheduler", "num_inference_steps", "eta", "seed", "guidance_scale")
    sampling = {key: made_by["sampling"][key] for key in keys}
    arguments |= sampling
    steps = "1 step" if sampling["num_inference_steps"] == 1 else f"{sampling['num_inference_steps']} steps"
    parts.append(f"{sampling['scheduler']} in {steps}, seed {sampling['seed']}")
    if variance := made_by["sampling"].get("variance"):  # set if it differs from the model's
        arguments["variance"] = variance
        parts.append(f"variance {variance}")
    if classes := made_by["sampling"]["class_labels"]:
        arguments["class_labels"] = classes
        parts.append("1 class" if len(classes) == 1 else f"{len(classes)} classes in turn")
    if (precision := made_by["sampling"].get("mixed_precision", "no")) != "no":
        arguments["mixed_precision"] = precision
        parts.append(f"precision {precision}")
    changed = [key for key, default in DEFAULTS.items() if sampling[key] != default]
    parts += [f"{key.split('_')[0]} {sampling[key]:g}" for key in changed]
    return ", ".join(parts), arguments


def _bound_settings(entry: Mapping[str, Any], made_by: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    arguments = {name: entry[name] for name in ("evaluations_per_image", "is_estimate")} | {"seed": made_by["seed"]}
    text = f"{entry['evaluations_per_image']} terms per image, seed {made_by['seed']}"
    if (precision := made_by.get("mixed_precision", "no")) != "no":
        arguments["mixed_precision"] = precision
        text += f", precision {precision}"
    return text, arguments
