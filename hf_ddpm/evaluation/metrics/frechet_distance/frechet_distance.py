"""The Frechet distance between features of generated and real images, as a metric of `evaluate`.

metric = evaluate.load("hf_ddpm/evaluation/metrics/frechet_distance")
metric.add_batch(features=[row.tobytes() for row in generated], is_real=[False] * len(generated))
metric.add_batch(features=[row.tobytes() for row in real], is_real=[True] * len(real))
metric.compute()
"""

import datasets
import evaluate

from hf_ddpm.evaluation.frechet import Moments, frechet_distance
from hf_ddpm.evaluation.rows import from_bytes, split_by_kind

_CITATION = """Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500"""

_INPUTS = """
Args:
    features: features of each image, as bytes of a float32 (or `dtype`) array.
    is_real: True for real images, False for generated images.
    dtype: "float32" or "float64".

Returns:
    frechet_distance: the distance; compare only values for equal numbers of images.
"""


class FrechetDistance(evaluate.Metric):  # type: ignore[misc]
    """Frechet distance, see `hf_ddpm.evaluation.frechet`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Frechet distance between the Gaussian fits of two sets of features.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"features": datasets.Value("binary"), "is_real": datasets.Value("bool")}),
        )

    def _compute(self, features: list[bytes], is_real: list[bool], dtype: str = "float32") -> dict[str, float]:
        generated, real = split_by_kind(from_bytes(features, dtype), is_real)
        return {"frechet_distance": frechet_distance(Moments.of(generated), Moments.of(real))}
