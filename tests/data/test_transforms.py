import io

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from hf_ddpm.data import store
from hf_ddpm.data.transforms import crop_at, fit
from hf_ddpm.images import to_signed
from tests.data.files import image_format, load


def encoded(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("mode", "format"),
    [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "PNG"), ("RGBA", "PNG"),
     ("RGBA", "WEBP"), ("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "JPEG"), ("RGB", "BMP"), ("RGB", "TIFF")],
)  # fmt: skip
def test_each_mode_is_converted_to_each_number_of_channels(mode, format, channels):
    options = {"lossless": True} if format == "WEBP" else {}
    picture = PILImage.new("RGB", (10, 9), (255, 255, 255)).convert(mode)
    pixels = fit(encoded(picture, format, **options), image_format((9, 10), channels))
    assert pixels.shape == (channels, 9, 10) and pixels.dtype == np.uint8
    assert pixels.min() >= 253  # white stays white, and opaque


def over(front, alpha, back):
    """Return the color of a pixel with opacity `alpha` / 255 over an opaque color."""
    return [alpha / 255 * f + (1 - alpha / 255) * b for f, b in zip(front, back, strict=True)]


def luma(rgb):
    return [0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]]


def transparent(kind):
    """Return an image of one color and opacity, with its color and its alpha."""
    if kind == "palette":
        picture = PILImage.new("P", (8, 8))
        picture.putpalette([255, 0, 0])
        return encoded(picture, transparency=bytes([128])), (255, 0, 0), 128
    if kind == "hidden palette":
        return encoded(PILImage.new("P", (8, 8)), transparency=0), (0, 0, 0), 0
    if kind == "hidden gray":
        return encoded(PILImage.new("L", (8, 8), 70), transparency=70), (70, 70, 70), 0
    if kind == "hidden color":
        return encoded(PILImage.new("RGB", (8, 8), (70, 7, 0)), transparency=(70, 7, 0)), (70, 7, 0), 0
    if kind == "hidden bit":
        return encoded(PILImage.new("1", (8, 8), 1), transparency=255), (255, 255, 255), 0
    if kind == "LA":
        return encoded(PILImage.new("LA", (8, 8), (200, 128))), (200, 200, 200), 128
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    return encoded(PILImage.new("RGBA", (8, 8), (255, 0, 0, 128)), kind, **options), (255, 0, 0), 128


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "LA", "palette", "hidden palette", "hidden gray", "hidden color",
                                  "hidden bit"])  # fmt: skip
@pytest.mark.parametrize(
    ("background", "color"), [("blue", (0, 0, 255)), ("#336699", (51, 102, 153)), (None, (255, 255, 255))]
)
def test_transparent_pixels_show_background(kind, background, color):
    row, front, alpha = transparent(kind)
    options = {} if background is None else {"background": background}
    expected = over(front, alpha, color)
    for channels, pixel in ((3, expected), (1, luma(expected))):
        pixels = fit(row, image_format(8, channels, **options))
        np.testing.assert_allclose(pixels, np.array(pixel).reshape(-1, 1, 1) * np.ones((1, 8, 8)), atol=1)
    pixels = fit(row, image_format(8, 4, **options))
    assert (pixels[3] == alpha).all() and (alpha == 0 or (pixels[:3, 0, 0] == front).all())  # unchanged


def test_background_is_added_before_resizing():
    picture = PILImage.new("RGBA", (16, 16), (255, 255, 255, 0))  # transparent white, which must not be visible
    picture.paste((0, 0, 0, 255), (0, 0, 16, 8))
    pixels = fit(encoded(picture), image_format(8, 3, background="black"))
    assert pixels.max() == 0


@pytest.mark.parametrize("resident", [True, False])
def test_16_bit_gray_keeps_every_level(tmp_path, monkeypatch, resident):
    if not resident:
        monkeypatch.setattr(store, "RESIDENT_BYTES", 0)
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    PILImage.fromarray(levels).save(tmp_path / "a.png")
    PILImage.fromarray(levels.astype(np.int32)).save(tmp_path / "b.tiff")  # mode I
    PILImage.fromarray((levels // 257).astype(np.uint8)).save(tmp_path / "c.png")
    images = load(tmp_path, resolution=64, channels=1, levels=65536)
    batch = images[torch.arange(3)]
    assert batch.dtype == torch.uint16
    np.testing.assert_array_equal(batch[0, 0].numpy(), levels)
    np.testing.assert_array_equal(batch[1, 0].numpy(), levels)
    np.testing.assert_array_equal(batch[2, 0].numpy(), levels // 257 * 257)  # 8 bits span the same range
    signed = to_signed(batch[:1], 65536).double()
    expected = torch.from_numpy(levels.astype(np.float64) / 32767.5 - 1)
    torch.testing.assert_close(signed[0, 0], expected, rtol=0, atol=2**-22)  # float32 near 1
    assert to_signed(torch.tensor([65535], dtype=torch.uint16), 65536).item() == 1


def test_16_bit_gray_is_resized_without_losing_depth():
    ramp = np.repeat(np.arange(256, dtype=np.uint16)[:, None] + 30_000, 256, axis=1)
    (pixels,) = fit(encoded(PILImage.fromarray(ramp)), image_format(128, 1, levels=65536))
    middle = pixels[16:-16, 64].astype(int)
    np.testing.assert_array_equal(np.diff(middle), 2)


def test_losing_bit_depth_is_rejected():
    deep = encoded(PILImage.fromarray(np.full((8, 8), 300, np.uint16)))
    with pytest.raises(
        ValueError, match=r"more than 8 bits per channel.*use --levels 65536 with --channels 1 to keep them"
    ):
        fit(deep, image_format(8, 1))
    floats = encoded(PILImage.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")
    with pytest.raises(ValueError, match="--value_range LOW HIGH"):
        fit(floats, image_format(8, 1, levels=65536))
    beyond = encoded(PILImage.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF")
    with pytest.raises(ValueError, match="from 70000 to 70000 do not fit in 16 bits"):
        fit(beyond, image_format(8, 1, levels=65536))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resolution": 0, "channels": 3}, "--resolution 0: "),
     ({"resolution": (8, 0), "channels": 3}, "--resolution 8 0: "),
     ({"resolution": 8, "channels": 0}, "--channels 0: expected at least 1"),
     ({"resolution": 8, "channels": 3, "crop": "left"}, "crop='left': expected one of 'center', 'random'"),
     ({"resolution": 8, "channels": 3, "levels": 1}, "--levels 1: ")],
)  # fmt: skip
def test_invalid_formats_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        image_format(**options)


def test_height_comes_before_width():
    picture = PILImage.fromarray(np.arange(12 * 20, dtype=np.uint8).reshape(12, 20))
    np.testing.assert_array_equal(fit(encoded(picture), image_format((12, 20), 1))[0], np.asarray(picture))
    np.testing.assert_array_equal(fit(encoded(picture), image_format((12, 10), 1))[0], np.asarray(picture)[:, 5:15])
    with pytest.raises(ValueError, match=r"size 12x20 is smaller than the resolution 20x12 \(height x width\)"):
        fit(encoded(picture), image_format((20, 12), 1))


def test_orientation_is_applied_before_size_check():
    exif = PILImage.Exif()
    exif[0x0112] = 6  # a quarter to the right
    upright = np.zeros((16, 8), np.uint8)
    upright[:8] = 250
    lying = PILImage.fromarray(np.rot90(upright))  # a quarter to the left
    pixels = fit(encoded(lying, "PNG", exif=exif), image_format((16, 8), 1))
    np.testing.assert_array_equal(pixels[0], upright)


def test_images_of_one_pixel_are_supported():
    assert fit(encoded(PILImage.new("RGB", (1, 1), (1, 2, 3))), image_format(1, 3)).flatten().tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="size 1x1 is smaller than the resolution 8x8"):
        fit(encoded(PILImage.new("RGB", (1, 1))), image_format(8, 3))


def test_random_crops_reach_every_position():
    target = image_format((4, 4), 1, crop="random")
    wide = np.tile(np.arange(11, dtype=np.uint8), (4, 1))
    pixels = fit(encoded(PILImage.fromarray(wide)), target)
    assert pixels.shape == (1, 4, 11)  # the smaller side already has the target size
    just_below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    for left in range(8):
        for fraction in (left / 8, min((left + 0.99) / 8, just_below_one)):
            np.testing.assert_array_equal(crop_at(pixels, target, (0.3, fraction))[0], wide[:, left : left + 4])
    half = fit(encoded(PILImage.new("L", (40, 16))), target)
    assert half.shape == (1, 4, 10)  # the smaller side is resized to the target size


def test_center_and_random_crops_have_same_scale():
    gradient = PILImage.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (30, 1)))  # 60 x 30
    center = fit(encoded(gradient), image_format(10, 1))
    target = image_format(10, 1, crop="random")
    middle = crop_at(fit(encoded(gradient), target), target, (0.5, 0.5))
    np.testing.assert_allclose(center[0].astype(int), middle[0].astype(int), atol=7)  # within half a pixel
