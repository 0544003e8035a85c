import math

import numpy as np
import pytest
import torch

from hf_ddpm.evaluation.inception_score import inception_score


def test_an_unsure_classifier_scores_1():
    assert inception_score(torch.full((50, 8), 1 / 8), splits=5) == (pytest.approx(1), pytest.approx(0))
    # Also where it is sure, of always the same.
    assert inception_score(torch.eye(8)[[3] * 50], splits=5) == (pytest.approx(1), pytest.approx(0))


def test_sure_and_balanced_scores_the_number_of_classes():
    assert inception_score(torch.eye(8).repeat(10, 1), splits=1) == (pytest.approx(8), pytest.approx(0))


def test_the_score_is_the_exponential_of_the_mutual_information():
    # Two kinds of images, a fraction f of them: IS = exp(H(c) - H(c|x)).
    p, q, f = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.1, 0.8]), 0.25
    rows = torch.tensor(np.stack([p] * 25 + [q] * 75))

    def entropy(v):
        return -(v * np.log(v)).sum()

    expected = math.exp(entropy(f * p + (1 - f) * q) - f * entropy(p) - (1 - f) * entropy(q))
    assert inception_score(rows, splits=1)[0] == pytest.approx(expected, rel=1e-12)


def test_parts_are_shuffled_equal_and_make_a_deviation_over_their_number():
    rows = torch.eye(4).repeat_interleave(25, dim=0)  # sorted by class: an unshuffled part has one class, score 1
    mean, deviation = inception_score(rows, splits=4, seed=0)
    assert 3 < mean < 4 and deviation > 0
    assert inception_score(rows, splits=4, seed=0) == (mean, deviation)
    assert inception_score(rows, splits=4, seed=1) != (mean, deviation)
    # Two parts: the deviation over 2 of (a, b) is |a - b| / 2, which over 1 would be |a - b| / sqrt(2). With three
    # images in two parts the parts are of one image (score 1) and of two (2 if they differ, else 1).
    assert inception_score(torch.eye(3), splits=2) == (pytest.approx(1.5), pytest.approx(0.5))


def test_what_is_no_distribution_is_refused():
    rows = torch.full((10, 4), 0.25)
    negative, heavy, broken = rows.clone(), rows.clone(), rows.clone()
    negative[2] = torch.tensor([-0.5, 0.5, 0.5, 0.5])
    heavy[5, 0] = 0.3
    broken[7, 0] = math.nan
    for wrong, message in [
        (negative, "probabilities of image 2 are not allowed: at least 0, and of sum 1"),
        (heavy, "probabilities of image 5 are not allowed: at least 0, and of sum 1"),
        (broken, "probabilities of image 7 are not allowed: not all of them are finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            inception_score(wrong)
    for splits in (0, 11):
        with pytest.raises(ValueError, match=f"splits={splits} is not allowed: 1 to the 10 images"):
            inception_score(rows, splits=splits)
