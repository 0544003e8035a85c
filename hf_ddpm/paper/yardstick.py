"""Distances of many sets of generated images to the same real ones, whose features are extracted once."""

from typing import Any

from torch import Tensor

from hf_ddpm.evaluation.comparison import real_features
from hf_ddpm.evaluation.evaluate import Evaluator
from hf_ddpm.evaluation.extraction import Images, extract
from hf_ddpm.evaluation.features import Extracted
from hf_ddpm.evaluation.frechet import Moments, standard_error
from hf_ddpm.evaluation.results import Sets, figures

# Of the jackknife.
PARTS = 10


class DistanceToReference:
    """Measures equally many generated images, as `scripts/evaluate.py` does.

    Args:
        evaluator: What to measure by; all processes are to make a yardstick of it, and to call it.

    Attributes:
        count: Number of images.
        known: Features of the reference and, if there is to be a floor, of `count` held-out images.
        made_by: Which data and which extractor it is made of.

    Raises:
        ValueError: If there are fewer held-out images than asked for.
    """

    def __init__(self, evaluator: Evaluator):
        self.count = evaluator.count()
        self.extractor = evaluator.extractor
        self._processes = evaluator.processes
        reference = evaluator.reference
        assert reference is not None
        self.known, self.made_by = real_features(
            evaluator.request, self.extractor, reference, evaluator.for_floor, self.count, self._processes
        )
        self._reference = Moments.of(self.known[0])

    def features(self, images: Images) -> Tensor:
        """Returns the features of the first `count` images."""
        return self._extract(images).features

    def __call__(self, images: Images) -> dict[str, Any]:
        """Returns the Frechet distance of the first `count` images as `value`, with numbers of images.

        `floor` is what as many held-out images score, and `standard_error`, from 3 images on, that of the value.
        """
        generated = self._extract(images)
        figure = figures("fd", Sets(generated, *self.known))
        if self.count > 2:
            parts = [generated.features[first::PARTS] for first in range(min(PARTS, self.count))]
            figure["standard_error"] = standard_error(parts, self._reference)
        return figure

    def _extract(self, images: Images) -> Extracted:
        return extract(self.extractor, images, range(self.count), self._processes)


def what_was_compared(figure: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Returns what a figure of a yardstick is of, in a sentence or two."""
    data, extractor = made_by["dataset"], made_by["extractor"]
    floor = f" As many held-out images score {figure['floor']:.4g}." if "floor" in figure else ""
    return (
        f"Frechet distance of {figure['num_images']} images to the {figure['reference_images']} of {data['name']} "
        f"({data['reference_split']}), features: {extractor['name']}.{floor}"
    )
