"""Mean and covariance of the features of real images as a file, as pytorch-fid and guided-diffusion write it."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.evaluation.frechet import Moments, gaussian_distance
from hf_ddpm.utils.files import atomic_write, one_line


@dataclass(frozen=True)
class ReferenceStats:
    r"""What generated images are compared with by the Frechet distance, without the images.

    Attributes:
        name: Name of the file.
        sha256: Its checksum, in hex.
        mean: :math:`\mu`, float64, shape `(D,)`.
        covariance: :math:`\Sigma`, float64, shape `(D, D)`.
    """

    name: str
    sha256: str
    mean: Tensor
    covariance: Tensor

    @classmethod
    def read(cls, path: Path) -> "ReferenceStats":
        """Reads a `.npz` file.

        Args:
            path: The file, with the arrays `mu`, shape `(D,)`, and `sigma`, shape `(D, D)`; others may be beside them.

        Returns:
            The statistics.

        Raises:
            ValueError: If it cannot be read, or lacks an array, or one is not finite floats of that shape.
        """
        content = path.read_bytes()
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                mean, covariance = arrays["mu"], arrays["sigma"]
        except Exception as error:  # whatever zip archives and numpy raise
            reason = f"it lacks an array ({one_line(error)})" if isinstance(error, KeyError) else one_line(error)
            raise ValueError(f"--reference_stats {path}: {reason}; expected a .npz file of mu and sigma") from error
        shapes = f"mu {mean.shape} and sigma {covariance.shape}"
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not mean.size:
            raise ValueError(f"--reference_stats {path}: {shapes}; expected shapes (D,) and (D, D)")
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise ValueError(f"--reference_stats {path}: {mean.dtype} and {covariance.dtype}; expected floats")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"--reference_stats {path}: not all values of mu and sigma are finite")
        largest = np.abs(covariance).max()
        is_symmetric = np.allclose(covariance, covariance.T, rtol=0, atol=1e-5 * largest)
        if not is_symmetric or covariance.diagonal().min() < -1e-5 * largest:
            raise ValueError(f"--reference_stats {path}: sigma is not a covariance matrix")
        checksum = hashlib.sha256(content).hexdigest()
        tensors = [torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance)]
        return cls(path.name, checksum, *tensors)

    def check(self, width: int, extractor: str) -> None:
        """Raises a `ValueError` unless the features of an extractor have as many dimensions."""
        if len(self.mean) != width:
            raise ValueError(
                f"--reference_stats {self.name}: {len(self.mean)} dimensions, but features of extractor {extractor!r}"
                f" have {width}; expected statistics of the same extractor"
            )

    def distance(self, features: Tensor) -> float:
        """Returns the Frechet distance of features, shape `(N, D)`, to these statistics."""
        moments = Moments.of(features)
        mean, covariance = moments.mean.cpu(), moments.covariance.cpu()
        return gaussian_distance(mean, covariance, self.mean, self.covariance)


def write_reference_stats(path: Path, features: Tensor) -> None:
    """Writes mean `mu` and covariance `sigma` of features, shape `(N, D)`, as a `.npz` file, whole or not at all."""
    moments = Moments.of(features)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, mu=moments.mean.cpu().numpy(), sigma=moments.covariance.cpu().numpy())
