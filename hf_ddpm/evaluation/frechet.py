r"""The Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500), known as FID.

.. math:: d^2 = \|\mu_1 - \mu_2\|^2
    + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2})

This is the squared 2-Wasserstein distance between the Gaussians with these means and covariances. Its bias decreases
with the number of images n, about as 1/n: compare only distances computed from equal numbers of images.
"""

import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.evaluation.rows import check_features, check_same_width
from hf_ddpm.utils.files import atomic_write, one_line

CHUNK_SIZE = 2**12


@dataclass(frozen=True)
class Moments:
    r"""Mean and covariance of features.

    Attributes:
        mean: :math:`\mu`, float64, shape `(D,)`.
        covariance: :math:`\Sigma`, unbiased, float64, shape `(D, D)`.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Compute the moments of features.

        Args:
            features: Features of at least 2 images, any float, shape `(N, D)`; converted to float64.

        Returns:
            The moments, on the same device.

        Raises:
            ValueError: If there are fewer than 2 images, or a feature is not finite.
        """
        check_features("features", features, at_least=2)
        parts = torch.split(features, CHUNK_SIZE)  # a float64 copy of all rows may not fit into memory
        mean = torch.stack([rows.double().sum(dim=0) for rows in parts]).sum(dim=0) / len(features)
        scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
        for rows in parts:
            centered = rows.double() - mean
            scatter += centered.T @ centered
        return cls(mean, scatter / (len(features) - 1))

    @classmethod
    def read(cls, path: Path) -> "Moments":
        """Read a `.npz` file in the format of pytorch-fid and guided-diffusion.

        Args:
            path: The file, with the arrays `mu`, shape `(D,)`, and `sigma`, shape `(D, D)`; other arrays are ignored.

        Returns:
            The moments, on the CPU.

        Raises:
            ValueError: If the file cannot be read, or an array is missing, not finite, or has a wrong type or shape.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                mean, covariance = arrays["mu"], arrays["sigma"]
        except Exception as error:  # zipfile and numpy raise many types of errors
            reason = f"array is missing ({one_line(error)})" if isinstance(error, KeyError) else one_line(error)
            raise ValueError(f"--reference_stats {path}: {reason}; expected a .npz file of mu and sigma") from error
        shapes = f"mu {mean.shape} and sigma {covariance.shape}"
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not mean.size:
            raise ValueError(f"--reference_stats {path}: {shapes}; expected shapes (D,) and (D, D)")
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise ValueError(f"--reference_stats {path}: {mean.dtype} and {covariance.dtype}; expected floats")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"--reference_stats {path}: expected finite values of mu and sigma")
        largest = np.abs(covariance).max()
        is_symmetric = np.allclose(covariance, covariance.T, rtol=0, atol=1e-5 * largest)
        if not is_symmetric or covariance.diagonal().min() < -1e-5 * largest:
            raise ValueError(f"--reference_stats {path}: expected a covariance matrix sigma")
        return cls(*(torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance)))

    def save(self, path: Path) -> None:
        """Write the moments to a `.npz` file for `read`, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, mu=self.mean.cpu().numpy(), sigma=self.covariance.cpu().numpy())


def frechet_distance(moments: Moments, reference: Moments) -> float:
    """Compute the Frechet distance :math:`d^2` between two sets of features.

    Args:
        moments: Moments of one set.
        reference: Moments of the other.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        ValueError: If the dimensions differ.

    Example:
        Features shifted by one in each of two dimensions:

        >>> features = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> round(frechet_distance(Moments.of(features), Moments.of(features + 1)), 6)
        2.0
    """
    check_same_width(len(moments.mean), len(reference.mean))
    mean, covariance = reference.mean.to(moments.mean.device), reference.covariance.to(moments.mean.device)
    # With S1 = A A' and S2 = B B', the trace of the square root is the sum of the singular values of A'B. Unlike the
    # eigenvalues of a product of three matrices, they are accurate even if a covariance is singular.
    overlap = torch.linalg.svdvals(_factor(moments.covariance).T @ _factor(covariance)).sum()
    distance = (moments.mean - mean).square().sum() + moments.covariance.trace() + covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


def standard_error(parts: Sequence[Tensor], reference: Moments) -> float:
    r"""Estimate the standard error of the Frechet distance of a set, by the jackknife.

    .. math:: \sqrt{\frac{g - 1}{g} \sum_j (d^2_{-j} - \bar{d^2_{-\cdot}})^2}

    where :math:`d^2_{-j}` is the distance of the set without its part `j`. It measures the variation over other samples
    of the same model, and does not include the bias from a small number of images.

    Args:
        parts: Features of the `g` parts, at least 2, each of about the same number of images.
        reference: Moments of the other set, assumed to be exact.

    Returns:
        The standard error.

    Raises:
        ValueError: If there are fewer than 2 parts, or for the reasons of `frechet_distance`.
    """
    if len(parts) < 2:
        raise ValueError(f"{len(parts)} parts: expected at least 2")
    without = [
        frechet_distance(Moments.of(torch.cat([*parts[:left_out], *parts[left_out + 1 :]])), reference)
        for left_out in range(len(parts))
    ]
    return math.sqrt((len(parts) - 1) * statistics.pvariance(without))


def _factor(covariance: Tensor) -> Tensor:
    """Return `A` such that `A A'` is the covariance; drop directions whose variance is only rounding error."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.finfo(values.dtype).eps * len(values) * values.max()
    factor: Tensor = vectors * torch.where(values > noise, values, 0.0).sqrt()
    return factor
