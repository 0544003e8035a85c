"""Mean negative log-likelihood of images in bits per dimension, as a metric of `evaluate`.

metric = evaluate.load("hf_ddpm/evaluation/metrics/bits_per_dim")
metric.add_batch(nats=negative_log_likelihoods)
metric.compute(dimensions=3 * 32 * 32)
"""

import math

import datasets
import evaluate
import numpy as np

_CITATION = """Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239"""

_INPUTS = """
Args:
    nats: negative log-likelihood of each image, or a bound on it, in nats, summed over all dimensions.
    dimensions: number of values per image, channels times height times width.

Returns:
    bits_per_dim: mean over the images.
    standard_error: standard error of the mean; missing for one image.
"""


class BitsPerDim(evaluate.Metric):  # type: ignore[misc]
    """Mean negative log-likelihood in bits per dimension, computed from nats per image."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean negative log-likelihood in bits per dimension.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"nats": datasets.Value("float64")}),
        )

    def _compute(self, nats: list[float], dimensions: int) -> dict[str, float]:
        if dimensions < 1:
            raise ValueError(f"dimensions={dimensions}: expected at least 1")
        bits = np.asarray(nats, np.float64) / (dimensions * math.log(2))
        result = {"bits_per_dim": float(bits.mean())}
        if len(bits) > 1:
            result["standard_error"] = float(bits.std(ddof=1) / math.sqrt(len(bits)))
        return result
