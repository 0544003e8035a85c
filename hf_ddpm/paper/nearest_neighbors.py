"""Generated images beside the training images that they are nearest to (Figs. 12 and 15): are they copies?"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.extraction import Images
from hf_ddpm.evaluation.pictures import copied_fraction, nearest_picture
from hf_ddpm.evaluation.precision_recall import nearest
from hf_ddpm.evaluation.results import METRIC_SEED
from hf_ddpm.paper.study import Study, table
from hf_ddpm.paper.yardstick import DistanceToReference
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.options import option, require_at_least

# Sides beyond which images are compared smaller: of all pixels, those of a large set would not fit into memory.
MOST_PIXELS = 32
AT_A_TIME = 256


@dataclass
class NearestConfig:
    """Samples and the training images nearest to them, by pixels and by features (Figs. 12, 15)."""

    num_images: int = option("samples to search the nearest among; those that are shown are the nearest of all", 100)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 2, "num_images")


def nearest_neighbors(study: Study, options: NearestConfig) -> None:
    """Writes `nearest-neighbors`, .json, .md and a picture for pixels and for features.

    Args:
        study: The model and its data.
        options: How many samples.

    Raises:
        ValueError: If there are no data, or an argument is not allowed.
    """
    evaluator = study.evaluator("fd", options.num_images)
    yardstick = DistanceToReference(evaluator)
    training, held_out, numbers = evaluator.reference, evaluator.held_out, range(yardstick.count)
    assert training is not None
    samples = study.samples(yardstick.count, Sampling(study.subject.seed, len(study.pipe.scheduler)))
    real = [as_points(training, range(len(training)))]
    if held_out is not None:
        real.append(as_points(held_out, choose(len(held_out), yardstick.count, METRIC_SEED)))
    spaces = {
        "pixels": (as_points(samples, numbers), *real),
        "features": (yardstick.features(samples), *yardstick.known),
    }
    found = {}
    for name, (of_samples, of_training, *of_held_out) in spaces.items():
        study.draw(f"nearest-neighbors_{name}.png", nearest_picture(samples, of_samples, training, of_training))
        found[name] = {"samples": median(of_samples, of_training)}
        if of_held_out:
            found[name]["held_out"] = median(of_held_out[0], of_training)
    copies = copied_fraction(samples, numbers, training, study.levels)
    figures = {"median_distances": found, "exact_copies": copies, "num_images": yardstick.count}
    text = report(figures, yardstick.made_by)
    title = "Nearest neighbors (Figs. 12 and 15)"
    study.write("nearest-neighbors", title, text, figures, asdict(options), yardstick.made_by)


def as_points(images: Images, numbers: Any) -> Tensor:
    """Returns images on the scale [0, 255] as points of a space, no larger than 32 pixels a side, shape `(n, D)`."""
    height, width = (min(side, MOST_PIXELS) for side in images.shape[1:])
    parts = []
    for start in range(0, len(numbers), AT_A_TIME):
        pixels = images[torch.tensor(numbers[start : start + AT_A_TIME])]
        small = F.adaptive_avg_pool2d(pixels.float(), (height, width))
        parts.append(small.flatten(1).cpu())
    return torch.cat(parts)


def median(points: Tensor, reference: Tensor) -> float:
    """Returns the median distance of points to the nearest one of the reference."""
    return nearest(points, reference)[0].quantile(0.5).item()


def report(figures: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Returns what was found, in Markdown."""
    data, count = made_by["dataset"], figures["num_images"]
    rows = [[name, *medians.values()] for name, medians in figures["median_distances"].items()]
    return "\n\n".join(
        [
            f"Of {count} samples those that are nearest to an image of {data['name']} ({data['reference_split']}), on "
            "the left of each row, with the three nearest of these.",
            "![Nearest by pixels](nearest-neighbors_pixels.png)",
            f"![Nearest by features](nearest-neighbors_features.png) (features: {made_by['extractor']['name']})",
            table(["distance by", "samples", "held-out images"][: len(rows[0])], rows),
            "Median distances to the nearest training image"
            + (f"; for comparison, of {count} held-out images. " if len(rows[0]) > 2 else ". ")
            + f"Samples that equal a training image in every pixel: {100 * figures['exact_copies']:.3g}%.",
        ]
    )
