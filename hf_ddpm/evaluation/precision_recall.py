r"""Improved precision and recall, and nearest neighbors (Kynkaanniemi et al. 2019, arXiv 1904.06991).

The region of a set of features is the union of balls :math:`\bigcup_i B(x_i, r_i)`, where the radius :math:`r_i` is the
distance from :math:`x_i` to its `k`-th nearest neighbor in the set. Precision is the fraction of generated images in
the region of the real images; recall is the fraction of real images in the region of the generated images.
"""

import torch
from torch import Tensor

from hf_ddpm.evaluation.rows import check_pair

CHUNK_SIZE = 1024

# Points closer than this fraction of their distance from the origin count as equal: float32 features of an image differ
# by about this much between batches.
SAME_POINT = 1e-6


def precision_recall(features: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall.

    Both depend on the numbers of images: compare only values for equal numbers, preferably with `n = m`.

    Args:
        features: Features of generated images, shape `(n, D)`; converted to float64.
        reference: Features of real images, shape `(m, D)`.
        k: Balls reach to the `k`-th nearest neighbor, from 1 to `min(n, m) - 1`.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: If `k` is out of range, a feature is not finite, or the dimensions differ.
    """
    check_pair(features, reference)
    for rows in (features, reference):
        if not 1 <= k < len(rows):
            raise ValueError(f"k={k}: expected 1 to {len(rows) - 1}, less than the number of images of a set")
    precision = _fraction_inside(features, reference, k)
    return precision, _fraction_inside(reference, features, k)


def nearest(features: Tensor, reference: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the nearest neighbors in a reference set, such as the training images most similar to a sample.

    Args:
        features: Features, shape `(n, D)`; converted to float64.
        reference: Features of the reference set, shape `(m, D)`.
        k: Number of neighbors, from 1 to `m`.

    Returns:
        Distances, ascending, float64, and indices into the reference, int64, both of shape `(n, k)`. Copies have
        distance 0.

    Raises:
        ValueError: If `k` is out of range, a feature is not finite, or the dimensions differ.
    """
    check_pair(features, reference)
    if not 1 <= k <= len(reference):
        raise ValueError(f"k={k}: expected 1 to {len(reference)}, the number of reference images")
    y = reference.double()
    neighbors = [
        _squared_distances(rows.double(), y).topk(k, dim=1, largest=False) for rows in torch.split(features, CHUNK_SIZE)
    ]
    return torch.cat([part.values for part in neighbors]).sqrt(), torch.cat([part.indices for part in neighbors])


def _fraction_inside(features: Tensor, reference: Tensor, k: int) -> float:
    # The nearest neighbor of a point is the point itself, so the k-th other neighbor is at index k.
    radii = nearest(reference, reference, k + 1)[0][:, -1]
    y = reference.double()
    inside = [
        (_squared_distances(rows.double(), y).sqrt() <= radii).any(dim=1) for rows in torch.split(features, CHUNK_SIZE)
    ]
    return torch.cat(inside).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    sizes = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
    squared = sizes - 2 * x @ y.T
    return torch.where(squared <= SAME_POINT**2 / 2 * sizes, 0.0, squared)
