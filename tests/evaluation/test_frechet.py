import math
import operator
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from hf_ddpm.evaluation.frechet import CHUNK_SIZE, Moments, frechet_distance, standard_error


def features(count, width=6, seed=0, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(width, width))
    return torch.tensor((scale * rng.normal(size=(count, width)) @ mixing + shift).astype(np.float32))


def with_moments(mean, covariance):
    """Return the 2 D points mean +- c l_j, with l_j the columns of a square root of the covariance."""
    d = len(mean)
    root = np.linalg.cholesky(covariance) * math.sqrt((2 * d - 1) / 2)
    return torch.tensor(np.concatenate([mean + root.T, mean - root.T]))


def test_distance_of_gaussians_with_diagonal_covariances():
    # Diagonal covariances: d^2 = |m1 - m2|^2 + sum_i (s_i - r_i)^2.
    m1, m2 = np.array([0.5, -1.0, 2.0]), np.array([0.0, 1.0, 2.5])
    s, r = np.array([1.0, 0.5, 3.0]), np.array([2.0, 0.0, 1.0])
    expected = ((m1 - m2) ** 2).sum() + ((s - r) ** 2).sum()
    t = [torch.tensor(v) for v in (m1, np.diag(s**2), m2, np.diag(r**2))]
    assert frechet_distance(Moments(*t[:2]), Moments(*t[2:])) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(Moments(*t[2:]), Moments(*t[:2])) == pytest.approx(expected, abs=1e-12)


def test_distance_of_gaussians_with_noncommuting_covariances():
    # For 2 x 2 matrices, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), without a matrix square root.
    s1, s2 = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    assert not np.allclose(s1 @ s2, s2 @ s1)
    m1, m2 = np.array([1.0, 2.0]), np.array([-0.5, 0.25])
    trace_of_root = math.sqrt(np.trace(s1 @ s2) + 2 * math.sqrt(np.linalg.det(s1) * np.linalg.det(s2)))
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * trace_of_root
    gaussians = [Moments(*map(torch.tensor, pair)) for pair in ((m1, s1), (m2, s2))]
    assert frechet_distance(*gaussians) == pytest.approx(expected, abs=1e-12)
    # The same from features with these moments.
    points, others = Moments.of(with_moments(m1, s1)), Moments.of(with_moments(m2, s2))
    np.testing.assert_allclose(points.mean, m1, rtol=0, atol=1e-14)
    np.testing.assert_allclose(points.covariance, s1, rtol=0, atol=1e-14)
    assert frechet_distance(points, others) == pytest.approx(expected, abs=1e-12)


def test_distance_of_points_without_rounding():
    # Points +-e_j scaled by powers of two, so that all operations are exact.
    scales, others = np.array([1.0, 2.0, 0.5, 0.25]), np.array([4.0, 0.5, 0.5, 8.0])
    mean = np.array([1.5, -0.25, 0.0, 3.0])
    points = np.concatenate([mean + np.diag(scales), mean - np.diag(scales)])
    reference = np.concatenate([np.diag(others), -np.diag(others)])
    variance = 2 / 7  # two of 8 points have distance 1 from the mean; n - 1 = 7
    expected = (mean**2).sum() + variance * ((scales - others) ** 2).sum()
    distance = frechet_distance(Moments.of(torch.tensor(points)), Moments.of(torch.tensor(reference)))
    assert distance == pytest.approx(expected, abs=1e-9)


def test_distance_equals_that_of_scipy_sqrtm():
    a, b = features(40, 12, 1).double().numpy(), features(50, 12, 2, 1.5, 0.3).double().numpy()
    s1, s2 = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    distance = frechet_distance(Moments.of(torch.tensor(a)), Moments.of(torch.tensor(b)))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_distance_is_accurate_with_fewer_images_than_dimensions():
    # With A, B the centered features over sqrt(n - 1), tr sqrt = |A B'|_*, without computing a covariance.
    a, b = features(20, 80, 1).double(), features(30, 80, 2, 1.2).double()
    (x, n), (y, m) = (((v - v.mean(0)).numpy(), len(v) - 1) for v in (a, b))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum() / math.sqrt(n * m)
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected = shift + (x**2).sum() / n + (y**2).sum() / m - 2 * overlap
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-11)


def test_distance_equals_that_of_torchmetrics():
    class Flatten(nn.Module):
        num_features = 48

        def forward(self, pixels):
            return pixels.flatten(1).float() / 255

    images = torch.randint(0, 256, (2, 200, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[1] //= 2
    metric = FrechetInceptionDistance(feature=Flatten()).set_dtype(torch.float64)
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    generated, real = (Moments.of(Flatten()(images[i])) for i in (1, 0))
    assert frechet_distance(generated, real) == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_moments_have_float64_accuracy(shift):
    # At 1000, squared means are 10^8 times the variances: without centering, only 8 digits would be correct.
    x = features(5000, scale=0.1, shift=shift)
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.double().mean(0), rtol=1e-14, atol=1e-10)
    np.testing.assert_allclose(moments.covariance, np.cov(x.double().numpy().T), rtol=0, atol=1e-10)


def exact_moments(features):
    """Return mean and covariance of float32 features, computed in rational numbers."""
    rows = [[Fraction(value) for value in row] for row in features.double().tolist()]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    centered = [[value - m for value, m in zip(row, mean, strict=True)] for row in rows]
    columns = list(zip(*centered, strict=True))
    products = [[sum(map(operator.mul, x, y)) / (len(rows) - 1) for y in columns] for x in columns]
    values = [float(value) for value in mean], [[float(value) for value in row] for row in products]
    return Moments(*(torch.tensor(value, dtype=torch.float64) for value in values))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.1), (200.0, 0.0), (0.01, 100.0), (1e5, 3e6)])
def test_moments_and_distances_equal_those_of_exact_sums(scale, shift):
    x, y = features(300, 4, 1, scale, shift), features(200, 4, 2, 1.1 * scale, shift)
    exact, reference = exact_moments(x), exact_moments(y)
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, exact.mean, rtol=1e-13)
    atol = 1e-12 * exact.covariance.max().item()
    np.testing.assert_allclose(moments.covariance, exact.covariance, rtol=0, atol=atol)
    expected = frechet_distance(exact, reference)
    assert expected > 0 and frechet_distance(moments, Moments.of(y)) == pytest.approx(expected, rel=1e-12)


def test_moments_of_more_than_one_chunk():
    x = features(CHUNK_SIZE + 7, 3)
    x[CHUNK_SIZE:] += 100
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(x.double().numpy().T), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_other_precisions_are_converted_exactly(dtype):
    x = features(50).to(dtype)
    for name, value in vars(Moments.of(x.double())).items():
        assert torch.equal(getattr(Moments.of(x), name), value)


def test_distance_of_set_to_itself_is_zero():
    x = Moments.of(features(100, shift=5.0))
    assert 0 <= frechet_distance(x, x) < 1e-9


def test_invalid_features_raise_errors():
    x = features(10)
    broken = x.clone()
    broken[4, 2] = math.nan
    for act, message in [
        (lambda: Moments.of(broken), "features of image 4: expected finite values"),
        (lambda: Moments.of(x[0]), r"features: float32 of shape \(6,\); expected floats of shape"),
        (lambda: Moments.of(x[:1]), "features of 1 images: expected at least 2"),
        (lambda: frechet_distance(Moments.of(x), Moments.of(x[:, :5])), "features of 6 dimensions: expected 5, like"),
    ]:
        with pytest.raises(ValueError, match=message):
            act()


def test_standard_error_is_deviation_over_samples():
    reference = Moments.of(features(5000, seed=999))
    distances, errors = [], []
    for seed in range(150):
        rows = features(200, seed=seed, shift=0.5, scale=1.3)
        distances.append(frechet_distance(Moments.of(rows), reference))
        errors.append(standard_error([rows[part::10] for part in range(10)], reference))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(distances), rel=0.2)


def test_standard_error_is_jackknife_over_parts():
    rows, reference = features(30, seed=1), Moments.of(features(50, seed=2))
    parts = [rows[:10], rows[10:20], rows[20:]]
    without = [torch.cat([rows[10:]]), torch.cat([rows[:10], rows[20:]]), rows[:20]]
    distances = np.array([frechet_distance(Moments.of(others), reference) for others in without])
    expected = math.sqrt(2 / 3 * ((distances - distances.mean()) ** 2).sum())
    assert standard_error(parts, reference) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="1 parts: expected at least 2"):
        standard_error([rows], reference)
