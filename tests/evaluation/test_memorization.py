import numpy as np
import torch
from PIL import Image as PILImage

from hf_ddpm.evaluation.memorization import copied_fraction, nearest_picture
from hf_ddpm.images import grid
from tests.evaluation.pixels import Pixels


def test_copies_are_counted_after_rounding_to_levels():
    reference, images = Pixels(50), Pixels(10, seed=1)
    assert copied_fraction(images, range(10), reference, 256) == 0
    images.pixels[3], images.pixels[7] = reference.pixels[49], reference.pixels[0]
    assert copied_fraction(images, range(10), reference, 256) == 0.2
    assert copied_fraction(images, range(4), reference, 256) == 0.25
    # Pixels are rounded to the nearest of 17 values, which are 255 / 16 apart.
    reference.pixels[0], images.pixels[7] = 16, 23
    assert copied_fraction(images, range(10), reference, 17) == 0.2
    images.pixels[7, 0, 0, 0] = 24
    assert copied_fraction(images, range(10), reference, 17) == 0.1


def test_picture_shows_closest_images_and_their_neighbors():
    # With these features, generated image 5 is 0.1 from real image 2, image 0 is 0.2 from real image 7; others are far.
    reference, images = Pixels(8, (3, 64, 64)), Pixels(6, (3, 64, 64), seed=1)
    real = torch.tensor([0.0, 10, 20, 30, 40, 50, 60, 70]).unsqueeze(1)
    generated = torch.tensor([70.2, 14.85, 24.9, 34.8, 44.7, 20.1]).unsqueeze(1)
    sheet = np.asarray(nearest_picture(images, generated, reference, real))
    top = len(sheet) - 6 * 70  # below the labels; a row has 64 pixels and a gap of 6
    assert sheet.shape[1:] == (6 + 4 * 70, 3) and sheet[:top, :, 0].min() < 100

    blank = [PILImage.new("RGB", (64, 64))] * 4
    labels = np.asarray(grid(blank, 4, column_labels=("sample", "nearest", "2nd", "3rd")))
    np.testing.assert_array_equal(sheet[:top], labels[:top])

    def tile(row, column):
        return sheet[top + 70 * row :, 6 + 70 * column :][:64, :64].transpose(2, 0, 1)

    for row, index, neighbors in [(0, 5, (2, 3, 1)), (1, 0, (7, 6, 5)), (5, 2, (2, 3, 1))]:
        np.testing.assert_array_equal(tile(row, 0), images.pixels[index])
        for column, neighbor in enumerate(neighbors, start=1):
            np.testing.assert_array_equal(tile(row, column), reference.pixels[neighbor])
