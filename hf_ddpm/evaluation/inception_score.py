r"""The Inception score (Salimans et al. 2016, arXiv 1606.03498): classifiable images of many classes.

.. math:: \mathrm{IS} = \exp E_x \, D_{KL}(p(c \mid x) \,\|\, p(c))

It lies between 1 and the number of classes. It has no reference: copies of one image per class have the best score.
"""

import torch
from torch import Tensor

from hf_ddpm.evaluation.rows import check_features
from hf_ddpm.utils.seeds import METRIC_ORDER, generator

# How far the probabilities of an image may be from a sum of 1: float32 softmax over a thousand classes.
TOLERANCE = 1e-4


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    r"""Return the mean of the scores of equal parts of the images, and their standard deviation.

    The images are shuffled first, since they may be sorted by class. The score falls with the size of a part: 5,000
    images is what is usual.

    Args:
        probabilities: :math:`p(c \mid x)`, shape `(N, C)`, rows with sum 1; computed with in float64.
        splits: Number of parts, from 1 to the number of images.
        seed: Seed of the shuffle.

    Returns:
        Mean and standard deviation (divided by `splits`, not by one less) over the parts.

    Raises:
        ValueError: If `splits` is not allowed, or a row is no probability distribution.
    """
    check_features("probabilities", probabilities)
    p = probabilities.double()
    wrong = (p < 0).any(dim=1) | ((p.sum(dim=1) - 1).abs() > TOLERANCE)
    if bool(wrong.any()):
        raise ValueError(f"probabilities of image {int(wrong.nonzero()[0])} are not allowed: at least 0, and of sum 1")
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits={splits} is not allowed: 1 to the {len(p)} images")
    p = p[torch.randperm(len(p), generator=generator(seed, METRIC_ORDER)).to(p.device)]
    edges = [i * len(p) // splits for i in range(splits + 1)]
    scores = torch.stack([_score(p[start:end]) for start, end in zip(edges, edges[1:], strict=False)])
    return scores.mean().item(), scores.std(correction=0).item()


def _score(p: Tensor) -> Tensor:
    marginal = p.mean(dim=0, keepdim=True)
    return (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1).mean().exp()
