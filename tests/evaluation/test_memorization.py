import numpy as np
import torch
from PIL import Image as PILImage

from hf_ddpm.evaluation.memorization import copied_fraction, nearest_picture
from hf_ddpm.images import grid
from tests.evaluation.pixels import Pixels


def test_copies_are_counted_on_the_values_that_pixels_take():
    reference, images = Pixels(50), Pixels(10, seed=1)
    assert copied_fraction(images, range(10), reference, 256) == 0
    images.pixels[3], images.pixels[7] = reference.pixels[49], reference.pixels[0]
    assert copied_fraction(images, range(10), reference, 256) == 0.2
    assert copied_fraction(images, range(4), reference, 256) == 0.25
    # Of 17 values, 255 / 16 apart, the nearest counts.
    reference.pixels[0], images.pixels[7] = 16, 23
    assert copied_fraction(images, range(10), reference, 17) == 0.2
    images.pixels[7, 0, 0, 0] = 24
    assert copied_fraction(images, range(10), reference, 17) == 0.1


def test_the_picture_shows_what_is_nearest_and_its_neighbors():
    # One-dimensional features by hand: generated 5 is 0.1 from real 2, generated 0 is 0.2 from real 7, others are far.
    reference, images = Pixels(8, (3, 64, 64)), Pixels(6, (3, 64, 64), seed=1)
    known = torch.tensor([0.0, 10, 20, 30, 40, 50, 60, 70]).unsqueeze(1)
    generated = torch.tensor([70.2, 14.85, 24.9, 34.8, 44.7, 20.1]).unsqueeze(1)
    sheet = np.asarray(nearest_picture(images, generated, reference, known))
    top = len(sheet) - 6 * 70  # below the labels; 64 pixels, and 6 behind them
    assert sheet.shape[1:] == (6 + 4 * 70, 3) and sheet[:top, :, 0].min() < 100

    blank = [PILImage.new("RGB", (64, 64))] * 4
    labels = np.asarray(grid(blank, 4, column_labels=("sample", "nearest", "2nd", "3rd")))
    np.testing.assert_array_equal(sheet[:top], labels[:top])

    def tile(row, column):
        return sheet[top + 70 * row :, 6 + 70 * column :][:64, :64].transpose(2, 0, 1)

    for row, number, neighbors in [(0, 5, (2, 3, 1)), (1, 0, (7, 6, 5)), (5, 2, (2, 3, 1))]:
        np.testing.assert_array_equal(tile(row, 0), images.pixels[number])
        for column, neighbor in enumerate(neighbors, start=1):
            np.testing.assert_array_equal(tile(row, column), reference.pixels[neighbor])
