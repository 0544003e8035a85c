r"""The kernel distance between two sets of features (Binkowski et al. 2018, arXiv 1801.01401), known as KID.

The squared maximum mean discrepancy

.. math:: \mathrm{MMD}^2 = E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)], \quad k(x, y) = (x \cdot y / D + 1)^3

is zero if the distributions have equal first three moments. Unlike the Frechet distance, the estimate is unbiased, so
that values for different numbers of images are comparable. It may be slightly negative.
"""

import math

import torch
from torch import Tensor

from hf_ddpm.evaluation.rows import check_pair
from hf_ddpm.utils.seeds import METRIC_ORDER, generator

CHUNK_SIZE = 1024


def squared_mmd(features: Tensor, reference: Tensor) -> float:
    r"""Return the unbiased estimate from all pairs of images.

    .. math:: \frac{1}{n (n - 1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m (m - 1)} \sum_{i \ne j} k(y_i, y_j)
        - \frac{2}{n m} \sum_{i, j} k(x_i, y_j)

    Args:
        features: Features :math:`x_i`, shape `(n, D)`; converted to float64.
        reference: Features :math:`y_j`, shape `(m, D)`.

    Returns:
        The estimate.

    Raises:
        ValueError: If a set has fewer than 2 images, a feature is not finite, or the dimensions differ.
    """
    check_pair(features, reference, at_least=2)
    x, y = features.double(), reference.double()
    across = _kernel_sum(x, y) / (len(x) * len(y))
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * across


def kernel_distance(
    features: Tensor, reference: Tensor, *, block_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the mean of the estimates from disjoint blocks of images, and its standard error.

    Both sets are shuffled and split into blocks; a remainder is dropped. The cost is linear in the number of images.
    Since blocks are disjoint, the standard error includes the randomness of both sets; with two blocks it is imprecise.

    Args:
        features: Features, shape `(n, D)`; converted to float64.
        reference: Features of the other set, shape `(m, D)`.
        block_size: Number of images of each set per block, from 2 to half of the smaller set.
        seed: Seed of the shuffle.

    Returns:
        The estimate and its standard error.

    Raises:
        ValueError: If `block_size` is out of range, a feature is not finite, or the dimensions differ.
    """
    check_pair(features, reference)
    blocks = min(len(features), len(reference)) // max(1, block_size)
    if block_size < 2 or blocks < 2:
        smaller = min(len(features), len(reference))
        raise ValueError(f"block_size={block_size}: expected 2 to half of the {smaller} images of the smaller set")
    shuffled = []
    for i, rows in enumerate((features, reference)):
        order = torch.randperm(len(rows), generator=generator(seed, METRIC_ORDER, i))
        shuffled.append(torch.split(rows[order.to(rows.device)], block_size)[:blocks])
    estimates = torch.tensor([squared_mmd(x, y) for x, y in zip(*shuffled, strict=True)], dtype=torch.float64)
    return estimates.mean().item(), estimates.std().item() / math.sqrt(blocks)


def _mean_of_pairs(x: Tensor) -> float:
    own = _kernel(x.square().sum(dim=1), x.shape[1]).sum().item()
    return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return math.fsum(_kernel(rows @ y.T, x.shape[1]).sum().item() for rows in torch.split(x, CHUNK_SIZE))


def _kernel(inner_products: Tensor, width: int) -> Tensor:
    return (inner_products / width + 1) ** 3
