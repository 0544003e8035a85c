"""The kernel distance between features of generated and real images, as a metric of `evaluate`.

metric = evaluate.load("hf_ddpm/evaluation/metrics/kernel_distance")
metric.add_batch(features=[row.tobytes() for row in generated], is_real=[False] * len(generated))
metric.add_batch(features=[row.tobytes() for row in real], is_real=[True] * len(real))
metric.compute(block_size=1000)
"""

import datasets
import evaluate

from hf_ddpm.evaluation.kernel import kernel_distance, squared_mmd
from hf_ddpm.evaluation.rows import from_bytes, split_by_kind

_CITATION = """Binkowski et al. 2018, Demystifying MMD GANs, arXiv 1801.01401"""

_INPUTS = """
Args:
    features: features of each image, as bytes of a float32 (or `dtype`) array.
    is_real: True for real images, False for generated images.
    dtype: "float32" or "float64".
    block_size: number of real and of generated images per block; by default, all pairs are used.
    seed: seed of the shuffle into blocks.

Returns:
    kernel_distance: the unbiased estimate.
    standard_error: standard error of the estimate; missing without `block_size`.
"""


class KernelDistance(evaluate.Metric):  # type: ignore[misc]
    """Kernel distance, see `hf_ddpm.evaluation.kernel`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Unbiased squared maximum mean discrepancy with a cubic kernel (KID).",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"features": datasets.Value("binary"), "is_real": datasets.Value("bool")}),
        )

    def _compute(
        self,
        features: list[bytes],
        is_real: list[bool],
        dtype: str = "float32",
        block_size: int | None = None,
        seed: int = 0,
    ) -> dict[str, float]:
        generated, real = split_by_kind(from_bytes(features, dtype), is_real)
        if block_size is None:
            return {"kernel_distance": squared_mmd(generated, real)}
        value, error = kernel_distance(generated, real, block_size=block_size, seed=seed)
        return {"kernel_distance": value, "standard_error": error}
