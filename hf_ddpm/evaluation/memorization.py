"""Memorization of training images: exact copies among samples, and nearest training images."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.evaluation.extraction import Images, digests
from hf_ddpm.evaluation.precision_recall import nearest
from hf_ddpm.images import grid, to_pictures

NEIGHBORS = 3
ROWS = 8


def nearest_picture(images: Images, features: Tensor, reference: Images, reference_features: Tensor) -> Image.Image:
    """Draw the generated images closest to the training images, one per row, each with its 3 nearest training images.

    Args:
        images: Generated images.
        features: Features of the first `n` generated images, shape `(n, D)`.
        reference: Training images.
        reference_features: Features of the training images, shape `(len(reference), D)`.

    Returns:
        The picture: generated images in the first column, then their nearest training images, nearest first.
    """
    distances, neighbors = nearest(features, reference_features, min(NEIGHBORS, len(reference)))
    rows = distances[:, 0].argsort(stable=True)[:ROWS].cpu()
    tiles = []
    for row in rows.tolist():
        tiles += to_pictures(images[torch.tensor([row])]) + to_pictures(reference[neighbors[row].cpu()])
    labels = ("sample", "nearest", "2nd", "3rd")[: 1 + neighbors.shape[1]]
    return grid(tiles, columns=len(labels), column_labels=labels)


def copied_fraction(images: Images, indices: Sequence[int], reference: Images, levels: int) -> float:
    """Return the fraction of generated images that equal a training image in every pixel.

    Args:
        images: Generated images.
        indices: Indices of the generated images to check.
        reference: Training images.
        levels: Number of evenly spaced pixel values; all images are rounded to these values first.
    """
    reference_digests = set(digests(reference, range(len(reference)), levels))
    return sum(digest in reference_digests for digest in digests(images, indices, levels)) / len(indices)
