"""Checks of feature matrices, with one row per image."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.diffusion.schedules import check_one_of

DTYPES = ("float32", "float64")


def check_features(name: str, features: Tensor, at_least: int = 1) -> None:
    """Raise a `ValueError` unless features are finite floats of shape `(N, D)` with `N >= at_least`."""
    if features.ndim != 2 or not features.is_floating_point():
        kind = f"{str(features.dtype).removeprefix('torch.')} of shape {tuple(features.shape)}"
        raise ValueError(f"{name}: {kind}; expected floats of shape (images, dimensions)")
    if len(features) < at_least:
        raise ValueError(f"{name} of {len(features)} images: expected at least {at_least}")
    finite = torch.isfinite(features).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"{name} of image {int((~finite).nonzero()[0])}: expected finite values")


def check_pair(features: Tensor, reference: Tensor, at_least: int = 1) -> None:
    """Raise a `ValueError` unless both sets pass `check_features` and have the same number of dimensions."""
    check_features("features", features, at_least)
    check_features("reference features", reference, at_least)
    check_same_width(features.shape[1], reference.shape[1])


def check_same_width(width: int, reference_width: int) -> None:
    """Raise a `ValueError` unless two sets of features have the same number of dimensions."""
    if width != reference_width:
        raise ValueError(f"features of {width} dimensions: expected {reference_width}, like the reference")


def from_bytes(rows: Sequence[bytes], dtype: str) -> Tensor:
    """Convert rows of bytes, as stored by `evaluate`, to `float32` or `float64` features of shape `(N, D)`."""
    check_one_of("dtype", dtype, DTYPES)
    lengths = {len(row) for row in rows}
    size = np.dtype(dtype).itemsize
    if len(lengths) != 1 or min(lengths) == 0 or min(lengths) % size:
        raise ValueError(f"rows of {sorted(lengths)} bytes: expected equal lengths, a multiple of {size}")
    return torch.from_numpy(np.frombuffer(bytearray().join(rows), dtype).reshape(len(rows), -1))


def split_by_kind(features: Tensor, is_real: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Return the rows of generated images and the rows of real images, in order."""
    mask = torch.tensor(is_real, dtype=torch.bool)
    return features[~mask], features[mask]
