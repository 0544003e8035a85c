"""Features as rows, one an image: how they are taken in parts, and unusable ones refused."""

import torch
from torch import Tensor


def in_parts(rows: Tensor, size: int) -> list[Tensor]:
    """Returns consecutive parts of at most `size` rows, without copying."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def check_features(name: str, features: Tensor, at_least: int = 1) -> None:
    """Raises a `ValueError` unless features are finite, of shape `(N, D)` and enough."""
    if features.ndim != 2 or not features.is_floating_point():
        kind = f"{str(features.dtype).removeprefix('torch.')} of shape {tuple(features.shape)}"
        raise ValueError(f"{name} as {kind} are not allowed: floats of shape (images, dimensions)")
    if len(features) < at_least:
        raise ValueError(f"{name} of {len(features)} images are not allowed: at least {at_least}")
    finite = torch.isfinite(features).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"{name} of image {int((~finite).nonzero()[0])} are not allowed: not all of them are finite")


def check_same_width(width: int, reference_width: int) -> None:
    """Raises a `ValueError` unless two sets of features have the same number of dimensions."""
    if width != reference_width:
        raise ValueError(f"features of {width} dimensions are not comparable with a reference of {reference_width}")
