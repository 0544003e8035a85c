"""Distances of many sets of generated images to the same real ones, whose features are extracted once."""

from typing import Any

from torch import Tensor

from hf_ddpm.evaluation.collect import Images, Processes, extract
from hf_ddpm.evaluation.comparison import real_features
from hf_ddpm.evaluation.evaluate import Evaluator
from hf_ddpm.evaluation.features import Extracted
from hf_ddpm.evaluation.report import Sets, figures


class Yardstick:
    """Measures equally many generated images, as `scripts/evaluate.py` does.

    Args:
        evaluator: What to measure by; all processes are to make a yardstick of it, and to call it.

    Attributes:
        count: Number of images.
        known: Features of the reference and of `count` held-out images.
        made_by: Which data and which extractor it is made of.

    Raises:
        ValueError: If there are fewer held-out images than asked for.
    """

    def __init__(self, evaluator: Evaluator):
        accelerator = evaluator.accelerator
        self.count = evaluator.count()
        self.extractor = evaluator.extractor
        self._processes = Processes(accelerator.process_index, accelerator.num_processes, accelerator.gather)
        assert evaluator.reference is not None
        self.known, self.made_by = real_features(
            evaluator.request, self.extractor, evaluator.reference, evaluator.held_out, self.count, self._processes
        )

    def features(self, images: Images) -> Tensor:
        """Returns the features of the first `count` images."""
        return self._extract(images).features

    def __call__(self, images: Images) -> dict[str, Any]:
        """Returns the Frechet distance of the first `count` images as `value`, and of held-out images as `floor`."""
        return figures("fd", Sets(self._extract(images), *self.known))

    def _extract(self, images: Images) -> Extracted:
        return extract(self.extractor, images, range(self.count), self._processes)
