import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.demo.layout import GRID_SIZE, STRIP_IMAGES, TILE_SIZE, progress_bar, row, sheet, strip
from hf_ddpm.demo.preview import PreviewFrame
from hf_ddpm.images import GAP


def parse_strip(text):
    """Return captions and pictures of a strip; None for a blank."""
    figures = re.findall(r"<figure>(.*?)<figcaption>(.*?)</figcaption></figure>", text)
    sources = [re.search(r'src="data:image/png;base64,([^"]+)"', figure) for figure, _ in figures]
    pictures = [source and np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1])))) for source in sources]
    return [caption for _, caption in figures], pictures


def pixels(picture, scale, size=8, line=0, column=0):
    """Return the pixels of an image in an enlarged grid."""
    side = scale * size + GAP
    return picture[GAP + line * side :: scale, GAP + column * side :: scale][:size, :size]


def test_grid_is_enlarged_by_repeating_pixels():
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    scale = 32  # GRID_SIZE // (3 columns of 8)
    picture = np.asarray(sheet(images))
    assert picture.shape == (2 * (scale * 8 + GAP) + GAP, 3 * (scale * 8 + GAP) + GAP)
    np.testing.assert_array_equal(pixels(picture, scale, line=1, column=1), images[4, 0])


@pytest.mark.parametrize(("count", "size"), [(1, 2048), (4, 1000), (64, 256)])
def test_large_images_are_not_enlarged(count, size):
    side = round(count**0.5) * (size + GAP) + GAP
    assert side > GRID_SIZE and sheet(torch.zeros(count, 3, size, size, dtype=torch.uint8)).size == (side, side)


@pytest.mark.parametrize(
    ("classes", "columns"),
    [([], 3), (["cat"], 3), (["cat", "dog"], 2), ([str(i) for i in range(10)], 7), ([str(i) for i in range(17)], 3)],
)
def test_classes_in_turn_get_one_column_each(classes, columns):
    picture = sheet(torch.zeros(7, 1, 8, 8, dtype=torch.uint8), classes)
    scale = GRID_SIZE // (8 * columns)
    assert picture.width == columns * (scale * 8 + GAP) + GAP
    rows = -(-7 // columns)
    assert (picture.height > rows * (scale * 8 + GAP) + GAP) == (1 < len(classes) <= 16)  # a line of labels


@pytest.mark.parametrize("frames", [1, 3, 8])
def test_strip_shows_first_images_and_blanks_for_future_frames(frames):
    images = torch.randint(256, (frames, 5, 1, 8, 8), dtype=torch.uint8)
    captions, pictures = parse_strip(strip(PreviewFrame(0, 21, images[-1], tuple(images))))
    assert captions == [f"step {step}" for step in range(0, 22, 3)]
    assert [picture is not None for picture in pictures] == [True] * frames + [False] * (8 - frames)
    scale = TILE_SIZE // 16
    for picture, frame in zip(pictures, images, strict=False):
        for i in range(STRIP_IMAGES):
            np.testing.assert_array_equal(pixels(picture, scale, line=i // 2, column=i % 2), frame[i, 0])


def test_interpolation_shows_both_ends_and_weights():
    images = torch.randint(256, (7, 1, 8, 8), dtype=torch.uint8)
    captions, pictures = parse_strip(row([images[0], None, *images[2:]], (8, 8)))
    assert captions == ["first", "0.00", "0.25", "0.50", "0.75", "1.00", "second"]
    assert pictures[1] is None
    for i in (0, 2, 3, 4, 5, 6):
        np.testing.assert_array_equal(pixels(pictures[i], TILE_SIZE // 8), images[i, 0])


def test_blank_has_aspect_ratio_of_image():
    assert row([None] * 4, (32, 16)).count("aspect-ratio: 32 / 16") == 4


def test_progress_bar():
    preview = PreviewFrame(7, 50, torch.zeros(1, 1, 8, 8, dtype=torch.uint8), (), 1.23)
    assert '<progress value="7" max="50">' in progress_bar(preview) and ">step 7 of 50, 1.2 s<" in progress_bar(preview)
    assert ">seed 3: step 7 of 50, 1.2 s<" in progress_bar(preview, "seed 3: ")
    assert '<progress value="0" max="1">' in progress_bar() and ">Ready<" in progress_bar()
