"""Distances of many sets of generated images to the same real ones, whose features are extracted once."""

from typing import Any

from hf_ddpm.evaluation.evaluate import Reference
from hf_ddpm.evaluation.extraction import Images, extract
from hf_ddpm.evaluation.features import Extracted
from hf_ddpm.evaluation.frechet import Moments, standard_error
from hf_ddpm.evaluation.results import figures

# Of the jackknife.
PARTS = 10


class DistanceToReference:
    """Frechet distances of equally many generated images, as `scripts/evaluate.py` computes them.

    Args:
        reference: The real images; all processes are to make a yardstick of them, and to call it.

    Attributes:
        count: Number of images.
        real: Features of the real images.

    Raises:
        ValueError: If there are fewer held-out images than asked for.
    """

    def __init__(self, reference: Reference):
        self.state, self.count = reference.state, reference.count()
        self.real = reference.features(self.count)

    def extract(self, images: Images) -> Extracted:
        """Returns the features of the first `count` images."""
        return extract(self.real.extractor, images, range(self.count), self.state)

    def __call__(self, images: Images) -> dict[str, Any]:
        """Returns the Frechet distance of the first `count` images as `value`, with numbers of images.

        `floor` is what as many held-out images score, and `standard_error`, from 3 images on, that of the value.
        """
        generated = self.extract(images)
        figure = figures("fd", generated, self.real)
        if self.count > 2:
            assert self.real.reference is not None
            parts = [generated.features[first::PARTS] for first in range(min(PARTS, self.count))]
            figure["standard_error"] = standard_error(parts, Moments.of(self.real.reference))
        return figure


def what_was_compared(figure: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Returns what a figure of a yardstick is of, in a sentence or two."""
    data, extractor = made_by["dataset"], made_by["extractor"]
    floor = f" As many held-out images score {figure['floor']:.4g}." if "floor" in figure else ""
    return (
        f"Frechet distance of {figure['num_images']} images to the {figure['reference_images']} of {data['name']} "
        f"({data['reference_split']}), features: {extractor['name']}.{floor}"
    )
