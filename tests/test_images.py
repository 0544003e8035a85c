import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.images import from_pil, grid, read_signed, save_picture, to_bytes, to_pictures, to_pil, to_signed, to_unit


def test_bytes_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    signed = to_signed(pixels)
    assert signed.min() == -1 and signed.max() == 1
    assert torch.equal(to_bytes(to_unit(signed)), pixels)


def test_signed_values_beyond_the_range_are_clipped():
    # And the others stay: they are not stretched to fill the range.
    signed = torch.tensor([-7.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0]).view(1, 1, 1, 7)
    assert to_bytes(to_unit(signed)).flatten().tolist() == [0, 0, 64, 128, 191, 255, 255]
    inside = torch.tensor([-0.5, 0.5]).view(1, 1, 1, 2)
    assert to_bytes(to_unit(inside)).flatten().tolist() == [64, 191]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pil_and_back(channels):
    pixels = torch.randint(256, (1, channels, 5, 7), dtype=torch.uint8)
    (picture,) = to_pil(pixels)
    assert picture.size == (7, 5)
    np.testing.assert_array_equal(from_pil(picture, channels), pixels[0].numpy())


def test_two_channels_are_no_picture():
    with pytest.raises(ValueError, match="images with 2 channels are not pictures: expected 1, 3 or 4; arrays"):
        to_pil(torch.zeros(1, 2, 4, 4, dtype=torch.uint8))


def test_pictures_to_look_at_show_every_channel():
    pixels = torch.randint(256, (2, 5, 4, 6), dtype=torch.uint8)
    for image, picture in zip(pixels, to_pictures(pixels), strict=True):
        shown = np.asarray(picture)  # 3 columns, 2 rows, a pixel between them
        assert shown.shape == (2 * 5 - 1, 3 * 7 - 1)
        for channel, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
            tile = shown[5 * row : 5 * row + 4, 7 * column : 7 * column + 6]
            np.testing.assert_array_equal(tile, image[channel].numpy())
    rgb = torch.randint(256, (1, 3, 4, 6), dtype=torch.uint8)
    np.testing.assert_array_equal(to_pictures(rgb)[0], to_pil(rgb)[0])


def test_a_grid_holds_every_image_in_its_place(tmp_path):
    tiles = [Image.new("L", (2, 3), color) for color in (10, 20, 30)]
    sheet = np.asarray(grid(tiles, columns=2, scale=2))
    assert sheet.shape == (2 * 7 - 1, 2 * 5 - 1)
    assert sheet[0, 0] == 10 and sheet[0, 5] == 20 and sheet[7, 0] == 30 and sheet[7, 5] == 0
    save_picture(grid(tiles), tmp_path / "grid.png")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_pictures_and_deep_arrays_that_fit_nothing_are_refused_in_one_line():
    with pytest.raises(ValueError, match="a picture of mode L is not allowed: 2 channels have none"):
        read_signed(Image.new("L", (4, 4)), (2, 4, 4))
    with pytest.raises(ValueError, match="images in a array of uint16, 0 to 0 are not allowed"):
        read_signed(np.zeros((4, 4, 1), np.uint16), (1, 4, 4))
