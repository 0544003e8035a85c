"""Distances of many sets of generated images to the same real ones."""

from typing import Any

from hf_ddpm.evaluation.extraction import Images, extract
from hf_ddpm.evaluation.frechet import Moments, standard_error
from hf_ddpm.evaluation.results import RealFeatures, figures
from hf_ddpm.paper.context import FigureContext

PARTS = 10  # of the jackknife


def distance(context: FigureContext, real: RealFeatures, images: Images) -> dict[str, Any]:
    """Compute the Frechet distance of the first `real.count` images, as `hf-ddpm evaluate` does.

    Returns:
        `value`, with numbers of images; `floor` is what as many held-out images score, and `standard_error`, from 3
        images on, that of the value.
    """
    generated = extract(real.extractor, images, range(real.count), context.accelerator)
    figure = figures("fd", generated, real)
    if real.count > 2:
        assert real.reference is not None
        parts = [generated.features[first::PARTS] for first in range(min(PARTS, real.count))]
        figure["standard_error"] = standard_error(parts, Moments.of(real.reference))
    return figure


def what_was_compared(figure: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Describe what a distance compares, in a sentence or two."""
    data, extractor = made_by["dataset"], made_by["extractor"]
    floor = f" As many held-out images score {figure['floor']:.4g}." if "floor" in figure else ""
    return (
        f"Frechet distance of {figure['num_images']} images to the {figure['reference_images']} of {data['name']} "
        f"({data['reference_split']}), features: {extractor['name']}.{floor}"
    )
