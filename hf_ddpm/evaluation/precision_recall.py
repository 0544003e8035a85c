r"""Precision and recall of generated images, and the nearest real ones (Kynkaanniemi et al. 2019, arXiv 1904.06991).

A set of features stands for the region :math:`\bigcup_i B(x_i, r_i)` of balls that reach to the `k`-th nearest other
member. Precision is the fraction of generated images in the region of the real ones, recall the reverse.
"""

import torch
from torch import Tensor

from hf_ddpm.evaluation.rows import check_pair

ROWS_AT_A_TIME = 1024

# Points nearer than a millionth of their distance from the origin are one point: that is about the rounding of float32
# features, which depends on the batch that an image was in.
SAME_POINT = 1e-6


def precision_recall(features: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall.

    Both depend on the number of images: compare only equal numbers, best of both sets.

    Args:
        features: Features of generated images, shape `(n, D)`; computed with in float64.
        reference: Features of real images, shape `(m, D)`.
        k: Which neighbor a ball reaches to, from 1 to one less than the size of a set.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: If `k` is not allowed, a feature is not finite, or the dimensions differ.
    """
    check_pair(features, reference)
    for rows in (features, reference):
        if not 1 <= k < len(rows):
            raise ValueError(f"k={k} is not allowed: 1 to {len(rows) - 1}, one less than the images of a set")
    precision = _fraction_inside(features, reference, k)
    return precision, _fraction_inside(reference, features, k)


def nearest(features: Tensor, reference: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the nearest members of a reference set, such as the training images that a sample resembles most.

    Args:
        features: Features, shape `(n, D)`; computed with in float64.
        reference: Features to search among, shape `(m, D)`.
        k: How many, from 1 to `m`.

    Returns:
        Distances, ascending, float64, and indices into the reference, int64, both of shape `(n, k)`. Copies have
        distance 0.

    Raises:
        ValueError: If `k` is not allowed, a feature is not finite, or the dimensions differ.
    """
    check_pair(features, reference)
    if not 1 <= k <= len(reference):
        raise ValueError(f"k={k} is not allowed: 1 to the {len(reference)} images of the reference")
    y = reference.double()
    found = [
        _squared_distances(rows.double(), y).topk(k, dim=1, largest=False)
        for rows in torch.split(features, ROWS_AT_A_TIME)
    ]
    return torch.cat([part.values for part in found]).sqrt(), torch.cat([part.indices for part in found])


def _fraction_inside(features: Tensor, reference: Tensor, k: int) -> float:
    # A member's nearest is itself: the k-th other one is the one after.
    radii = nearest(reference, reference, k + 1)[0][:, -1]
    y = reference.double()
    inside = [
        (_squared_distances(rows.double(), y).sqrt() <= radii).any(dim=1)
        for rows in torch.split(features, ROWS_AT_A_TIME)
    ]
    return torch.cat(inside).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    sizes = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
    squared = sizes - 2 * x @ y.T
    return torch.where(squared <= SAME_POINT**2 / 2 * sizes, 0.0, squared)
