import math

import numpy as np
import pytest
import torch

from hf_ddpm.evaluation.inception_score import inception_score


def test_uniform_or_constant_predictions_score_1():
    assert inception_score(torch.full((50, 8), 1 / 8), splits=5) == (pytest.approx(1), pytest.approx(0))
    # Also if all images are certainly of the same class.
    assert inception_score(torch.eye(8)[[3] * 50], splits=5) == (pytest.approx(1), pytest.approx(0))


def test_certain_and_balanced_predictions_score_number_of_classes():
    assert inception_score(torch.eye(8).repeat(10, 1), splits=1) == (pytest.approx(8), pytest.approx(0))


def test_score_is_exponential_of_mutual_information():
    # Two kinds of images, a fraction f of the first kind: IS = exp(H(c) - H(c|x)).
    p, q, f = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.1, 0.8]), 0.25
    rows = torch.tensor(np.stack([p] * 25 + [q] * 75))

    def entropy(v):
        return -(v * np.log(v)).sum()

    expected = math.exp(entropy(f * p + (1 - f) * q) - f * entropy(p) - (1 - f) * entropy(q))
    assert inception_score(rows, splits=1)[0] == pytest.approx(expected, rel=1e-12)


def test_parts_are_shuffled_and_deviation_is_over_their_number():
    rows = torch.eye(4).repeat_interleave(25, dim=0)  # sorted by class: an unshuffled part has one class, score 1
    mean, deviation = inception_score(rows, splits=4, seed=0)
    assert 3 < mean < 4 and deviation > 0
    assert inception_score(rows, splits=4, seed=0) == (mean, deviation)
    assert inception_score(rows, splits=4, seed=1) != (mean, deviation)
    # The deviation of two parts (a, b) is |a - b| / 2 with divisor 2 (it would be |a - b| / sqrt(2) with divisor 1).
    # Three images in two parts give a part of one image (score 1) and a part of two different images (score 2).
    assert inception_score(torch.eye(3), splits=2) == (pytest.approx(1.5), pytest.approx(0.5))


def test_invalid_probabilities_raise_errors():
    rows = torch.full((10, 4), 0.25)
    negative, too_large, broken = rows.clone(), rows.clone(), rows.clone()
    negative[2] = torch.tensor([-0.5, 0.5, 0.5, 0.5])
    too_large[5, 0] = 0.3
    broken[7, 0] = math.nan
    for wrong, message in [
        (negative, "probabilities of image 2: expected values of at least 0 with sum 1"),
        (too_large, "probabilities of image 5: expected values of at least 0 with sum 1"),
        (broken, "probabilities of image 7: expected finite values"),
    ]:
        with pytest.raises(ValueError, match=message):
            inception_score(wrong)
    for splits in (0, 11):
        with pytest.raises(ValueError, match=f"splits={splits}: expected 1 to 10, the number of images"):
            inception_score(rows, splits=splits)
