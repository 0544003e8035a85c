import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.images import (
    from_pil,
    grid,
    read_signed,
    sample_grid,
    save_animation,
    save_picture,
    to_bytes,
    to_pictures,
    to_pil,
    to_signed,
    to_unit,
)


def test_bytes_are_unchanged_by_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    signed = to_signed(pixels)
    assert signed.min() == -1 and signed.max() == 1
    assert torch.equal(to_bytes(to_unit(signed)), pixels)


def test_signed_values_outside_range_are_clipped():
    # Values inside the range are unchanged: the image is not rescaled.
    signed = torch.tensor([-7.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0]).view(1, 1, 1, 7)
    assert to_bytes(to_unit(signed)).flatten().tolist() == [0, 0, 64, 128, 191, 255, 255]
    inside = torch.tensor([-0.5, 0.5]).view(1, 1, 1, 2)
    assert to_bytes(to_unit(inside)).flatten().tolist() == [64, 191]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pil_and_back(channels):
    pixels = torch.randint(256, (1, channels, 5, 7), dtype=torch.uint8)
    (image,) = to_pil(pixels)
    assert image.size == (7, 5)
    np.testing.assert_array_equal(from_pil(image, channels), pixels[0].numpy())


def test_pil_images_cannot_have_two_channels():
    with pytest.raises(ValueError, match="PIL images cannot have 2 channels: expected 1, 3 or 4; use arrays or ten"):
        to_pil(torch.zeros(1, 2, 4, 4, dtype=torch.uint8))


def test_images_for_display_show_each_channel():
    pixels = torch.randint(256, (2, 5, 4, 6), dtype=torch.uint8)
    for image, display in zip(pixels, to_pictures(pixels), strict=True):
        shown = np.asarray(display)  # 3 columns and 2 rows, with a gap of one pixel
        assert shown.shape == (2 * 5 + 1, 3 * 7 + 1)
        for channel, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
            tile = shown[1 + 5 * row : 5 * row + 5, 1 + 7 * column : 7 * column + 7]
            np.testing.assert_array_equal(tile, image[channel].numpy())
    rgb = torch.randint(256, (1, 3, 4, 6), dtype=torch.uint8)
    np.testing.assert_array_equal(to_pictures(rgb)[0], to_pil(rgb)[0])


def test_grid_has_each_image_at_its_position(tmp_path):
    tiles = [Image.new("L", (2, 3), color) for color in (10, 20, 30)]
    sheet = np.asarray(grid(tiles, columns=2, scale=2, gap=1))
    assert sheet.shape == (2 * 7 + 1, 2 * 5 + 1)
    gray = sheet[0, 0]
    assert 128 < gray < 240  # light gray, so that the borders of white and black images are visible
    expected = np.full(sheet.shape, gray)
    expected[1:7, 1:5], expected[1:7, 6:10], expected[8:14, 1:5] = 10, 20, 30
    np.testing.assert_array_equal(sheet, expected)
    save_picture(grid(tiles), tmp_path / "grid.png")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(("side", "scale"), [(8, 8), (28, 3), (32, 2), (48, 2), (64, 1), (256, 1)])
def test_grids_upscale_small_images_by_integers(side, scale):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    sheet = np.asarray(grid([image]))
    gap = (len(sheet) - scale * side) // 2
    assert sheet.shape == (scale * side + 2 * gap, scale * side + 2 * gap, 3) and gap > 1
    tile = sheet[gap:-gap, gap:-gap]
    np.testing.assert_array_equal(tile, np.asarray(image).repeat(scale, 0).repeat(scale, 1))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_labels_do_not_cover_images(mode):
    tiles, more = [Image.new(mode, (64, 64), "white")] * 6, {"columns": 3}
    bare = np.asarray(grid(tiles, **more).convert("L")).astype(int)
    labels = {"column_labels": ["a", "b", "a label wider than its image"], "row_labels": ["first", "second"]}
    labeled = np.asarray(grid(tiles, **more, **labels, title="title").convert("L")).astype(int)
    for sheet in (bare, labeled):
        white = sheet == 255
        assert white.sum() == 6 * 64 * 64  # each image is completely visible
        # There is a gap between the images of each row and column.
        assert (np.diff(white.any(axis=0).astype(int)) == 1).sum() == 3 and (
            np.diff(white.any(axis=1).astype(int)) == 1
        ).sum() == 2
    dark, white = labeled < 100, labeled == 255
    top, left = white.any(axis=1).argmax(), white.any(axis=0).argmax()
    assert not (bare < 100).any() and not dark[top:, left:].any()
    assert dark[:top, left:].any() and dark[top : top + 64, :left].any() and dark[top + 70 : top + 134, :left].any()
    assert dark[:, -1].sum() == 0  # the wide label is not cut


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", ["column_labels", "row_labels"])
def test_each_label_is_at_its_row_or_column(kind, position):
    labels = ["", ""]
    labels[position] = "word"
    sheet = np.asarray(grid([Image.new("L", (64, 64), "white")] * 4, columns=2, **{kind: labels}))
    sheet = sheet if kind == "column_labels" else sheet.T
    white = sheet == 255
    band, left = sheet[: white.any(axis=1).argmax()], white.any(axis=0).argmax()  # before the first image
    parts = [band[:, left : left + 64], band[:, left + 70 : left + 134]]
    assert [bool((part < 100).any()) for part in parts] == [position == 0, position == 1]


def test_title_is_above_grid_and_not_cut():
    tile = [Image.new("L", (64, 64), "white")]
    bare, short, long = (np.asarray(grid(tile, title=title)) for title in ("", "t = 1", "a title wider than the image"))
    assert short.shape[1] == bare.shape[1] < long.shape[1] and short.shape[0] == long.shape[0] > bare.shape[0]
    for sheet in (short, long):
        dark = sheet < 100
        assert dark.any() and not dark[np.argmax((sheet == 255).any(axis=1)) :].any()
        assert not dark[:, -6:].any() and dark[:, -40:].any() == (sheet is long)
    assert not (bare < 100).any()


def test_few_classes_have_labeled_columns():
    pixels = torch.zeros(7, 1, 64, 64, dtype=torch.uint8)
    square = sample_grid(pixels)
    assert square.width == square.height  # 3 x 3
    by_class = sample_grid(pixels, ["cat", "dog"])
    assert by_class.width < square.width and by_class.height > square.height + 64  # 2 columns, 4 rows, labels
    assert sample_grid(pixels, [str(i) for i in range(100)]).size == square.size
    assert sample_grid(pixels[:1], ["cat", "dog"]).width < by_class.width  # one image, one column


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animation_shows_each_frame_and_last_one_longer(tmp_path, kind):
    frames = [Image.new("L", (8, 6), color) for color in (0, 100, 200)]
    save_animation(frames, tmp_path / f"a.{kind}", 50)
    with Image.open(tmp_path / f"a.{kind}") as animation:
        assert animation.n_frames == 3 and animation.size == (8, 6)
        animation.seek(2)
        assert abs(animation.convert("L").getpixel((4, 3)) - 200) < 8
        times = []
        for frame in range(3):
            animation.seek(frame)
            animation.load()
            times.append(animation.info["duration"])
        assert times == [50, 50, 1500] and animation.info["loop"] == 0  # repeats forever
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{kind}"]


def test_pil_images_and_arrays_of_other_types_are_rejected():
    with pytest.raises(ValueError, match="PIL image of mode L: expected an array or tensor with 2 channels"):
        read_signed(Image.new("L", (4, 4)), (2, 4, 4))
    with pytest.raises(ValueError, match=r"array of uint16 with values from 0 to 0: expected floats in \[0, 1\]"):
        read_signed(np.zeros((4, 4, 1), np.uint16), (1, 4, 4))
