import math

import numpy as np
import pytest
import torch

from hf_ddpm.evaluation import kernel
from hf_ddpm.evaluation.kernel import kernel_distance, squared_mmd


def draws(count, seed, width=4, shift=0.0):
    return torch.tensor(np.random.default_rng(seed).normal(loc=shift, size=(count, width)).astype(np.float32))


def brute_force(x, y):
    def k(a, b):
        return (np.dot(a, b) / len(a) + 1) ** 3

    x, y = x.double().numpy(), y.double().numpy()
    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_estimate_equals_formula(monkeypatch):
    x, y = draws(13, 0), draws(9, 1, shift=0.5)
    expected = brute_force(x, y)
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(kernel, "CHUNK_SIZE", 4)
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)


def test_estimate_is_unbiased():
    # For equal distributions the mean is 0 even with 8 images; the biased estimate, with i = j, would be far above 0.
    values = np.array([squared_mmd(draws(8, 2 * seed), draws(8, 2 * seed + 1)) for seed in range(2000)])
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean()) < 4 * error < 0.2
    assert (values < 0).any()


def test_distance_of_shifted_gaussians():
    # In one dimension MMD^2 = sum_p binom(3, p) (E x^p - E y^p)^2: for N(0, 1) and N(s, 1) the moments differ by
    # s, s^2 and s^3 + 3 s.
    s = 0.7
    expected = 3 * s**2 + 3 * s**4 + (s**3 + 3 * s) ** 2
    values = [squared_mmd(draws(400, 2 * i, 1), draws(400, 2 * i + 1, 1, s)) for i in range(200)]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 4 * error < 0.1 * expected


def test_block_estimate_is_unbiased_with_correct_error():
    results = [kernel_distance(draws(80, 2 * i), draws(90, 2 * i + 1), block_size=10, seed=i) for i in range(300)]
    values, errors = np.array(results).T
    spread = values.std(ddof=1)
    assert abs(values.mean()) < 4 * spread / math.sqrt(len(values))
    # The root mean square of the reported errors equals the actual deviation.
    assert math.sqrt((errors**2).mean()) == pytest.approx(spread, rel=0.2)


def test_blocks_are_shuffled_by_seed_and_disjoint(monkeypatch):
    x, y = draws(60, 0), draws(60, 1)
    x[30:] += 3  # sorted by class: without shuffling, each block would have one class
    first, again, other = (kernel_distance(x, y, block_size=10, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    # The blocks contain each image exactly once.
    blocks = []

    def record(a, b):
        blocks.append((a, b, squared_mmd(a, b)))
        return blocks[-1][2]

    monkeypatch.setattr(kernel, "squared_mmd", record)
    value, error = kernel_distance(x, y, block_size=20)
    for i, rows in enumerate((x, y)):
        together = torch.cat([block[i] for block in blocks])
        assert not torch.equal(together, rows)
        assert sorted(together.tolist()) == sorted(rows.tolist())
    estimates = [block[2] for block in blocks]
    assert len(estimates) == 3 and value == pytest.approx(np.mean(estimates), rel=1e-12)
    assert error == pytest.approx(np.std(estimates, ddof=1) / math.sqrt(3), rel=1e-12)


def test_invalid_input_raises_errors():
    x = draws(10, 0)
    broken = x.clone()
    broken[3, 0] = math.inf
    for act, message in [
        (lambda: squared_mmd(x, x[:1]), "reference features of 1 images: expected at least 2"),
        (lambda: squared_mmd(x[:1], x), "features of 1 images: expected at least 2"),
        (lambda: squared_mmd(x, broken), "reference features of image 3: expected finite values"),
        (lambda: squared_mmd(x, x[:, :2]), "features of 4 dimensions: expected 2, like the reference"),
        (lambda: kernel_distance(x, x, block_size=6), "block_size=6: expected 2 to half of the 10 images"),
        (lambda: kernel_distance(x, x, block_size=1), "block_size=1: expected"),
        (lambda: kernel_distance(x, x, block_size=0), "block_size=0: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            act()
