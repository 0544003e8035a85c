import itertools

import numpy as np
import pytest
import torch

from hf_ddpm.paper.pictures import rmse, sheet, variety


def test_rmse_is_on_the_scale_of_pixels():
    a, b = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    b[0] = 1.0  # half of all pixels are 255 off
    assert rmse(a, b) == pytest.approx(255 / np.sqrt(2))


def test_variety_is_the_mean_over_pairs_of_a_group():
    images = torch.rand(3, 4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    squares = [
        ((group[i] - group[j]) ** 2).mean().item() for group in images for i, j in itertools.combinations(range(4), 2)
    ]
    assert variety(images) == pytest.approx(255 * np.sqrt(np.mean(squares)), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_image_stands_at_its_place(channels):
    values = torch.tensor([[0.2, 0.4, 0.6], [0.8, 1.0, 0.0]])
    rows = [(f"row {i}", row.view(3, 1, 1, 1).expand(3, channels, 32, 32)) for i, row in enumerate(values)]
    page = np.asarray(sheet(rows, ["a", "b", "c"]))
    assert page.shape[-1] == max(3, channels)
    left, top = page.shape[1] - (3 * 64 + 2 * 3), page.shape[0] - (2 * 64 + 3)
    seen = [[page[top + 67 * i + 32, left + 67 * j + 32, 0] for j in range(3)] for i in range(2)]
    np.testing.assert_array_equal(seen, (values * 255).round().numpy())
    assert (page[top + 65, left:, :3] == 255).all()  # between the rows
    # Labels: dark on white, those of rows on the left, those of columns above.
    assert page[top : top + 64, : left - 4, 0].min() < 128 and page[:top, left:, 0].min() < 128
    assert page[0, 0, 0] == 255
