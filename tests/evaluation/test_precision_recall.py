import math

import numpy as np
import pytest
import torch

from hf_ddpm.evaluation import precision_recall as module
from hf_ddpm.evaluation.precision_recall import nearest, precision_recall


def draws(count, seed, width=3, shift=0.0):
    return torch.tensor(np.random.default_rng(seed).normal(loc=shift, size=(count, width)).astype(np.float32))


def brute_force(features, reference, k):
    def inside(points, others):
        radii = [sorted(math.dist(a, b) for j, b in enumerate(others) if j != i)[k - 1] for i, a in enumerate(others)]
        hits = [any(math.dist(p, o) <= r for o, r in zip(others, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    x, y = features.double().tolist(), reference.double().tolist()
    return inside(x, y), inside(y, x)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_definition(monkeypatch, k):
    x, y = draws(40, 0, shift=0.8), draws(55, 1)
    expected = brute_force(x, y, k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and expected[0] != expected[1]
    assert precision_recall(x, y, k=k) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(module, "CHUNK_SIZE", 7)
    assert precision_recall(x, y, k=k) == pytest.approx(expected, rel=1e-12)


def test_default_is_three_neighbors():
    x, y = draws(40, 0, shift=0.8), draws(55, 1)
    assert precision_recall(x, y) == precision_recall(x, y, k=3) != precision_recall(x, y, k=2)


def test_equal_and_disjoint_sets():
    x = draws(50, 0)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x + 100, x) == (0, 0)


def test_missing_modes_lower_recall_and_spread_points_lower_precision():
    # The real set has four well separated modes; the generated set has two of the modes, or points between all modes.
    modes = 10 * torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    real = torch.cat([draws(100, i) + mode for i, mode in enumerate(modes)])
    dropped = torch.cat([draws(200, 10 + i) + mode for i, mode in enumerate(modes[:2])])
    precision, recall = precision_recall(dropped, real)
    assert precision > 0.9 and 0.4 < recall < 0.5
    spread = torch.cat([real[::2], torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 10])
    precision, recall = precision_recall(spread, real)
    assert precision < 0.7 and recall > 0.9


def test_nearest_equals_brute_force(monkeypatch):
    x, y = draws(20, 0), draws(30, 1)
    expected = np.linalg.norm(x.double().numpy()[:, None] - y.double().numpy()[None], axis=2)
    monkeypatch.setattr(module, "CHUNK_SIZE", 6)
    distances, indices = nearest(x, y, 4)
    assert indices.tolist() == np.argsort(expected, axis=1)[:, :4].tolist()
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :4], rtol=1e-9)
    assert nearest(x, y)[1].shape == (20, 1)


def test_copies_far_from_origin_have_distance_0():
    # Computed as |x|^2 + |y|^2 - 2 x y, the distance of a copy is a rounding error, which must be set to 0.
    reference = draws(500, 0, width=64, shift=30)
    copies = torch.arange(0, 500, 9)
    distances, indices = nearest(reference[copies], reference, 2)
    assert indices[:, 0].equal(copies) and bool((distances[:, 0] == 0).all()) and bool((distances[:, 1] > 1).all())
    # So balls of radius 0, around points that occur k + 1 times, contain only the copies.
    repeated = reference[:10].repeat(4, 1)
    assert precision_recall(repeated, repeated) == (1, 1)
    assert precision_recall(repeated + 1e-3, repeated) == (0, 0)


def test_invalid_input_raises_errors():
    x = draws(10, 0)
    broken = x.clone()
    broken[3, 0] = math.nan
    for act, message in [
        (lambda: precision_recall(x[:3], x), "k=3: expected 1 to 2, less than the number of images of a set"),
        (lambda: precision_recall(x, x[:3]), "k=3: expected 1 to 2"),
        (lambda: precision_recall(x, x, k=0), "k=0: expected 1 to 9"),
        (lambda: precision_recall(broken, x), "features of image 3: expected finite values"),
        (lambda: precision_recall(x, broken), "features of image 3: expected finite values"),
        (lambda: precision_recall(x[:, :2], x), "features of 2 dimensions: expected 3, like the reference"),
        (lambda: nearest(x, x, 11), "k=11: expected 1 to 10, the number of reference images"),
        (lambda: nearest(x, x[:0]), "reference features of 0 images: expected at least 1"),
        (lambda: nearest(x, x[:, :2]), "features of 3 dimensions: expected 2, like the reference"),
    ]:
        with pytest.raises(ValueError, match=message):
            act()


def test_error_names_set_with_nonfinite_features():
    good, bad = torch.randn(6, 2), torch.randn(6, 2)
    bad[2, 1] = float("nan")
    for sets, name in (((bad, good), "features"), ((good, bad), "reference features")):
        with pytest.raises(ValueError, match=f"^{name} of image 2: expected finite values"):
            precision_recall(*sets)
