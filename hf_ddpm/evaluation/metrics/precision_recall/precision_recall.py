"""Improved precision and recall of generated images, as a metric of `evaluate`.

metric = evaluate.load("hf_ddpm/evaluation/metrics/precision_recall")
metric.add_batch(features=[row.tobytes() for row in generated], is_real=[False] * len(generated))
metric.add_batch(features=[row.tobytes() for row in real], is_real=[True] * len(real))
metric.compute(k=3)
"""

import datasets
import evaluate

from hf_ddpm.evaluation.precision_recall import precision_recall
from hf_ddpm.evaluation.rows import from_bytes, split_by_kind

_CITATION = """Kynkaanniemi et al. 2019, Improved Precision and Recall Metric, arXiv 1904.06991"""

_INPUTS = """
Args:
    features: features of each image, as bytes of a float32 (or `dtype`) array.
    is_real: True for real images, False for generated images.
    dtype: "float32" or "float64".
    k: the ball around an image reaches to its k-th nearest neighbor.

Returns:
    precision: fraction of generated images in the region of the real images.
    recall: fraction of real images in the region of the generated images.
"""


class PrecisionRecall(evaluate.Metric):  # type: ignore[misc]
    """Improved precision and recall, see `hf_ddpm.evaluation.precision_recall`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Improved precision and recall by nearest neighbors.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"features": datasets.Value("binary"), "is_real": datasets.Value("bool")}),
        )

    def _compute(
        self, features: list[bytes], is_real: list[bool], dtype: str = "float32", k: int = 3
    ) -> dict[str, float]:
        generated, real = split_by_kind(from_bytes(features, dtype), is_real)
        precision, recall = precision_recall(generated, real, k=k)
        return {"precision": precision, "recall": recall}
