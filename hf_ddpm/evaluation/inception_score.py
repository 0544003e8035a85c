r"""The Inception score (Salimans et al. 2016, arXiv 1606.03498).

.. math:: \mathrm{IS} = \exp E_x \, D_{KL}(p(c \mid x) \,\|\, p(c))

The score is between 1 and the number of classes. It is high if each image is clearly of one class and all classes are
equally frequent. It does not compare with real images: copies of one image per class have the best score.
"""

import torch
from torch import Tensor

from hf_ddpm.evaluation.rows import check_features
from hf_ddpm.utils.seeds import METRIC_ORDER, generator

# Maximum deviation of the sum of an image's probabilities from 1: rounding of a float32 softmax over 1000 classes.
TOLERANCE = 1e-4


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    r"""Return the mean and the standard deviation of the scores of equal parts of the images.

    The images are shuffled first, since they may be sorted by class. Small parts lower the score: 5,000 images per part
    are usual.

    Args:
        probabilities: :math:`p(c \mid x)`, shape `(N, C)`, each row with sum 1; converted to float64.
        splits: Number of parts, from 1 to the number of images.
        seed: Seed of the shuffle.

    Returns:
        Mean and population standard deviation (divisor `splits`) over the parts.

    Raises:
        ValueError: If `splits` is out of range, or a row is not a probability distribution.
    """
    check_features("probabilities", probabilities)
    p = probabilities.double()
    wrong = (p < 0).any(dim=1) | ((p.sum(dim=1) - 1).abs() > TOLERANCE)
    if bool(wrong.any()):
        raise ValueError(f"probabilities of image {int(wrong.nonzero()[0])}: expected values of at least 0 with sum 1")
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits={splits}: expected 1 to {len(p)}, the number of images")
    p = p[torch.randperm(len(p), generator=generator(seed, METRIC_ORDER)).to(p.device)]
    edges = [i * len(p) // splits for i in range(splits + 1)]
    scores = torch.stack([_score(p[start:end]) for start, end in zip(edges, edges[1:], strict=False)])
    return scores.mean().item(), scores.std(correction=0).item()


def _score(p: Tensor) -> Tensor:
    marginal = p.mean(dim=0, keepdim=True)
    return (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1).mean().exp()
