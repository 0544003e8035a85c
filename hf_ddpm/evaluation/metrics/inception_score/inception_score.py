"""The Inception score of images from their class probabilities, as a metric of `evaluate`.

metric = evaluate.load("hf_ddpm/evaluation/metrics/inception_score")
metric.add_batch(probabilities=[row.tobytes() for row in probabilities])
metric.compute(splits=10)
"""

import datasets
import evaluate

from hf_ddpm.evaluation.inception_score import inception_score
from hf_ddpm.evaluation.rows import from_bytes

_CITATION = """Salimans et al. 2016, Improved Techniques for Training GANs, arXiv 1606.03498"""

_INPUTS = """
Args:
    probabilities: class probabilities of each image, as bytes of a float32 (or `dtype`) array.
    dtype: "float32" or "float64".
    splits: number of parts.
    seed: seed of the shuffle into parts.

Returns:
    inception_score: mean over the parts.
    standard_deviation: standard deviation over the parts.
"""


class InceptionScore(evaluate.Metric):  # type: ignore[misc]
    """Inception score, see `hf_ddpm.evaluation.inception_score`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exponential of the mean KL divergence of the class probabilities from their mean.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"probabilities": datasets.Value("binary")}),
        )

    def _compute(
        self, probabilities: list[bytes], dtype: str = "float32", splits: int = 10, seed: int = 0
    ) -> dict[str, float]:
        score, deviation = inception_score(from_bytes(probabilities, dtype), splits=splits, seed=seed)
        return {"inception_score": score, "standard_deviation": deviation}
