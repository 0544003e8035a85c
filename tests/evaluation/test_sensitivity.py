"""Sensitivity of the metrics with the shipped extractor to 899 digits with known defects."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from hf_ddpm.config import DataConfig
from hf_ddpm.data.store import load_images
from hf_ddpm.evaluation.features import load_extractor
from hf_ddpm.evaluation.frechet import Moments, frechet_distance
from hf_ddpm.evaluation.kernel import squared_mmd
from hf_ddpm.evaluation.memorization import copied_fraction
from hf_ddpm.evaluation.precision_recall import precision_recall


def as_bytes(unit):
    return torch.from_numpy(np.round(unit.clip(0, 1) * 16) * 255 / 16).round().to(torch.uint8)


@pytest.fixture(scope="module")
def sets():
    train, test = (
        load_images(DataConfig("digits", split=split, resolution=[8], channels=1, class_column="label"))
        for split in ("train", "test")
    )
    random = np.random.default_rng(0)
    real, held_out = (images[torch.arange(len(images))] for images in (train, test))
    unit, count = held_out.numpy() / 255, len(held_out)
    flat = real.numpy().reshape(len(real), 64) / 255
    fit = random.multivariate_normal(flat.mean(0), np.cov(flat.T), count).reshape(count, 1, 8, 8)
    few = held_out[test.labels < 8]
    return real, {
        "held out": held_out,
        "noise 0.1": as_bytes(unit + 0.1 * random.normal(size=unit.shape)),
        "noise 0.25": as_bytes(unit + 0.25 * random.normal(size=unit.shape)),
        "blur 0.5": as_bytes(gaussian_filter(unit, (0, 0, 0.5, 0.5))),
        "blur 1": as_bytes(gaussian_filter(unit, (0, 0, 1, 1))),
        "Gaussian fit": as_bytes(fit),
        "no 8 and 9": few[torch.from_numpy(random.integers(len(few), size=count))],
        "copies": real[torch.from_numpy(random.integers(len(real), size=count))],
        "copies of 100": real[torch.from_numpy(random.integers(100, size=count))],
    }


@pytest.fixture(scope="module")
def features(sets):
    extractor = load_extractor("digits")
    real, others = sets
    return extractor(real).features, {name: extractor(images).features for name, images in others.items()}


def distances(features, metric):
    real, others = features
    return {name: metric(generated, real) for name, generated in others.items()}


def check_order(of):
    assert of["copies"] < of["held out"] < of["noise 0.1"] < of["noise 0.25"]
    assert of["held out"] < of["blur 0.5"] < of["blur 1"]
    assert of["held out"] < of["copies of 100"] < of["no 8 and 9"] < of["Gaussian fit"]


def test_frechet_distance_increases_with_defects(features):
    of = distances(features, lambda generated, real: frechet_distance(Moments.of(generated), Moments.of(real)))
    check_order(of)
    assert of["Gaussian fit"] > 10 * of["held out"]  # with pixels instead of features, the factor is only 1.5


def test_kernel_distance_increases_with_defects(features):
    check_order(distances(features, squared_mmd))


def test_missing_classes_lower_recall_and_bad_images_lower_precision(features):
    real, others = features
    results = (precision_recall(generated[:898], real, k=3) for generated in others.values())
    precision, recall = zip(*results, strict=True)
    precision, recall = dict(zip(others, precision, strict=True)), dict(zip(others, recall, strict=True))
    assert precision["no 8 and 9"] > precision["held out"] > precision["noise 0.25"] > precision["Gaussian fit"]
    assert recall["held out"] > recall["no 8 and 9"] > recall["copies of 100"]
    assert recall["held out"] > recall["blur 0.5"] > recall["blur 1"]


def test_copies_are_detected_although_their_distances_are_low(sets):
    real, others = sets
    copied = {name: copied_fraction(images, range(len(images)), real, 17) for name, images in others.items()}
    assert copied["copies"] == copied["copies of 100"] == 1 and copied["held out"] == copied["noise 0.1"] == 0
