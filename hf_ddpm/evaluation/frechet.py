r"""The Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500), from their moments.

.. math:: d^2 = \|\mu_1 - \mu_2\|^2
    + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2})

the squared 2-Wasserstein distance between the Gaussians with these means and covariances. It falls with the number of
images, about as 1/n: only distances from equally many images are comparable.
"""

import math
import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from hf_ddpm.evaluation.rows import check_features, check_same_width

# Features become whole multiples of 2^-28, of at most 40 bits: two limbs of 20 bits. A product of limbs has 40 bits,
# so that float64 adds up 2^12 of them, and int64 2^21, without rounding.
LIMB_BITS = 20
FRACTION_BITS = 28
LARGEST_FEATURE = 2.0 ** (2 * LIMB_BITS - FRACTION_BITS)
ROWS_AT_A_TIME = 2**12
MOST_IMAGES = 2**21


@dataclass(frozen=True)
class Moments:
    r"""First and second moments of features, as exact sums.

    Features are rounded to multiples of :math:`2^{-28}` (what float32 resolves at 1/32) and all that is added up
    after that are integers: sums do not depend on order, batches or processes. `+` is associative and commutative to
    the last bit. A feature is :math:`2^{-8} h + 2^{-28} l` with integer limbs :math:`h` and :math:`l`, and the sums
    are those of the vectors :math:`(h, l)`.

    Attributes:
        count: Number of images, int64, shape `()`.
        sums: Sums of the limbs, int64, shape `(2 D,)`.
        products: Sums of the products of any two limbs, int64, shape `(2 D, 2 D)`.
    """

    count: Tensor
    sums: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Returns the moments of features.

        Args:
            features: Features of magnitude at most 4096, any float, shape `(N, D)`; `N` may be 0.

        Returns:
            The moments, on the same device.

        Raises:
            ValueError: If a feature is not finite or too large.
        """
        check_features("features", features, at_least=0)
        if features.numel() and float(features.abs().max()) > LARGEST_FEATURE:
            raise ValueError(f"features reach {float(features.abs().max()):g}: at most {LARGEST_FEATURE:g} is allowed")
        width = 2 * features.shape[1]
        products = torch.zeros(width, width, dtype=torch.int64, device=features.device)
        sums = torch.zeros(width, dtype=torch.int64, device=features.device)
        for rows in torch.split(features, ROWS_AT_A_TIME):
            whole = (rows.double() * 2**FRACTION_BITS).round()
            high = (whole / 2**LIMB_BITS).round()
            limbs = torch.cat([high, whole - high * 2**LIMB_BITS], dim=1)
            sums += limbs.sum(dim=0).long()
            products += (limbs.T @ limbs).long()
        return cls(torch.tensor(len(features), device=features.device), sums, products)

    def __add__(self, other: "Moments") -> "Moments":
        """Returns the moments of both sets of features together, exactly."""
        check_same_width(self.width, other.width)
        return Moments(self.count + other.count, self.sums + other.sums, self.products + other.products)

    @property
    def width(self) -> int:
        """The number `D` of dimensions."""
        return len(self.sums) // 2

    @property
    def mean(self) -> Tensor:
        r"""The mean :math:`\mu`, float64, shape `(D,)`."""
        high, low = (self.sums.double() / self.count).view(2, -1)
        mean: Tensor = _value(1) * high + _value(0) * low
        return mean

    @property
    def covariance(self) -> Tensor:
        r"""The unbiased covariance :math:`\Sigma`, float64, shape `(D, D)`."""
        # Centered while still whole: in float64 the square of a large mean would swallow the variance.
        center = (self.sums.double() / self.count).round().long()
        products = self.products - torch.outer(center, self.sums) - torch.outer(self.sums, center)
        products += self.count * torch.outer(center, center)
        rest = (self.sums - self.count * center).double()
        scatter = (products.double() - torch.outer(rest, rest) / self.count).view(2, self.width, 2, self.width)
        mixed = scatter[0, :, 1] + scatter[1, :, 0]
        high, low = _value(1), _value(0)
        total: Tensor = high**2 * scatter[0, :, 0] + high * low * mixed + low**2 * scatter[1, :, 1]
        return total / (self.count - 1)


def frechet_distance(moments: Moments, reference: Moments) -> float:
    """Returns the Frechet distance :math:`d^2` between two sets of features.

    Args:
        moments: Moments of one set.
        reference: Moments of the other.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        ValueError: If a set has fewer than 2 images or more than 2^21, or the dimensions differ.

    Example:
        Moved by one in each of two dimensions:

        >>> features = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> round(frechet_distance(Moments.of(features), Moments.of(features + 1)), 6)
        2.0
    """
    check_same_width(moments.width, reference.width)
    for count in (int(moments.count), int(reference.count)):
        if not 2 <= count <= MOST_IMAGES:
            raise ValueError(f"moments of {count} images are not allowed: 2 to {MOST_IMAGES}")
    return gaussian_distance(moments.mean, moments.covariance, reference.mean, reference.covariance)


def standard_error(parts: Sequence[Moments], reference: Moments) -> float:
    r"""Returns the standard error of the Frechet distance of a set, by the jackknife.

    .. math:: \sqrt{\frac{g - 1}{g} \sum_j (d^2_{-j} - \bar{d^2_{-\cdot}})^2}

    where :math:`d^2_{-j}` is the distance of the set without its part `j`. It says how much the distance would differ
    for other images of the same kind, not how much it would fall if there were more of them.

    Args:
        parts: Moments of the `g` parts, of about equally many images each, at least 2.
        reference: Moments of the other set, which counts as known.

    Returns:
        The standard error.

    Raises:
        ValueError: As in `frechet_distance`, or if there is one part alone.
    """
    if len(parts) < 2:
        raise ValueError(f"{len(parts)} parts are not allowed: at least 2")
    without = [
        frechet_distance(reduce(operator.add, [part for i, part in enumerate(parts) if i != left_out]), reference)
        for left_out in range(len(parts))
    ]
    return math.sqrt((len(parts) - 1) * statistics.pvariance(without))


def gaussian_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Returns the Frechet distance :math:`d^2` between two Gaussians.

    Args:
        mean1: Mean of the first, float64, shape `(D,)`.
        covariance1: Covariance of the first, float64, shape `(D, D)`; may be singular.
        mean2: Mean of the second.
        covariance2: Covariance of the second.

    Returns:
        The distance, at least 0.
    """
    # With S1 = A A' and S2 = B B' the trace of the root is the sum of the singular values of A'B. Unlike the
    # eigenvalues of a product of three matrices, they keep their digits where a covariance is singular.
    overlap = torch.linalg.svdvals(_factor(covariance1).T @ _factor(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * overlap
    return max(0.0, float(distance))


def _factor(covariance: Tensor) -> Tensor:
    """Returns `A` with `A A'` the covariance, without the directions that rounding alone gives a variance."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.finfo(values.dtype).eps * len(values) * values.max()
    factor: Tensor = vectors * torch.where(values > noise, values, 0.0).sqrt()
    return factor


def _value(limb: int) -> float:
    """Returns what a unit of the low (0) or high (1) limb is worth."""
    return float(2.0 ** (limb * LIMB_BITS - FRACTION_BITS))
