"""Image files with damaged metadata are loaded, upright."""

import io
import struct
import zlib

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image as PILImage
from PIL import PngImagePlugin

from hf_ddpm.data.decoding import decode
from hf_ddpm.data.pictures import open_image
from hf_ddpm.data.transforms import fit
from tests.data.files import image_format, load, parquet, write_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
TURNED = {1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.transpose(1, 0, 2),
          6: np.rot90(PIXELS, -1), 7: PIXELS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(PIXELS)}  # fmt: skip


def encoded(format, **options):
    file = io.BytesIO()
    PILImage.fromarray(PIXELS).save(file, format, **({"lossless": True} if format == "WEBP" else {}), **options)
    return file.getvalue()


def exif(orientation):
    data = PILImage.Exif()
    data[0x0112], data[0x010F] = orientation, "maker"
    return data.tobytes()


def xmp(orientation):
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'


def upright(data):
    """Return the pixels of an image file, turned upright."""
    return np.asarray(open_image({"bytes": data, "path": None}))


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_each_exif_orientation_is_applied(format, orientation):
    np.testing.assert_array_equal(upright(encoded(format, exif=exif(orientation))), TURNED[orientation])


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_xmp_orientations_are_applied(orientation):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(orientation))
    np.testing.assert_array_equal(upright(encoded("PNG", pnginfo=info)), TURNED[orientation])
    np.testing.assert_array_equal(upright(encoded("WEBP", xmp=xmp(orientation).encode())), TURNED[orientation])
    # Also with damaged EXIF data.
    np.testing.assert_array_equal(
        upright(encoded("WEBP", xmp=xmp(orientation).encode(), exif=b"Exif\0\0nothing")), TURNED[orientation]
    )


@pytest.mark.parametrize("value", [0, 9, 77])
def test_invalid_orientations_are_ignored(value):
    np.testing.assert_array_equal(upright(encoded("PNG", exif=exif(value))), PIXELS)


def with_chunk(kind, content, checksum=None):
    """Return a PNG with orientation 6 and another chunk before its pixels."""
    data = encoded("PNG", exif=exif(6))
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return data[:33] + chunk + data[33:]


BOMB = zlib.compress(bytes(1 << 22))
CHUNKS = {
    "a text bomb": (b"zTXt", b"key\0\0" + BOMB),
    "an international text bomb": (b"iTXt", b"key\0\1\0\0\0" + BOMB),
    "a profile bomb": (b"iCCP", b"key\0\0" + BOMB),
    "an unknown compression of text": (b"zTXt", b"key\0\7" + BOMB),
    "a broken profile": (b"iCCP", b"no profile"),
    "a text without an end": (b"iTXt", b"key"),
    "a wrong checksum": (b"tEXt", b"key\0value", 1),
    "broken sizes": (b"pHYs", b"1"),
    "broken primaries": (b"cHRM", b"1"),
    "broken gamma": (b"gAMA", b"1"),
    "a broken rendering intent": (b"sRGB", b""),
    "a broken time": (b"tIME", b"1"),
    "an unknown chunk": (b"quUx", b"1"),
}


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_png_with_damaged_metadata_chunks_is_loaded(chunk):
    np.testing.assert_array_equal(upright(with_chunk(*chunk)), TURNED[6])


def test_png_with_more_text_than_pillow_allows_is_loaded(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 10)
    np.testing.assert_array_equal(upright(with_chunk(b"tEXt", b"key\0" + bytes(100))), TURNED[6])


def test_damaged_pixels_are_rejected():
    data = bytearray(with_chunk(*CHUNKS["a text bomb"]))
    data[data.index(b"IDAT") + 8] ^= 255
    with pytest.raises(Exception, match="."):
        upright(bytes(data))
    with pytest.raises(Exception, match="."):
        upright(encoded("PNG")[:-60])


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 7, 10, 12, 99])
@pytest.mark.parametrize("tag", [271, 282, 283, 296, 305, 315, 34665, 34853])
def test_tiff_with_tags_of_wrong_types_is_loaded(tag, kind):
    exif = PILImage.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    exif[0x8769], exif[0x8825] = {0x829A: 0.5}, {1: "N"}
    data = bytearray(encoded("TIFF", exif=exif.tobytes(), dpi=(72, 72), software="x", artist="y"))
    (start,) = struct.unpack_from("<L", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    (at,) = [at for at in range(start + 2, start + 2 + 12 * count, 12) if struct.unpack_from("<H", data, at)[0] == tag]
    for number in (None, 0, 2**31):
        struct.pack_into("<H", data, at + 2, kind)
        if number is not None:
            struct.pack_into("<L", data, at + 4, number)
        np.testing.assert_array_equal(upright(bytes(data)), TURNED[6])


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 7, 11, 12])
@pytest.mark.parametrize("tag", [259, 271, 282, 296, 305])
def test_jpeg_with_exif_tags_of_wrong_types_is_loaded(tag, kind):
    entry = struct.pack("<HHLL", tag, kind, 1, 7)
    turned = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)
    entries = sorted([entry, turned], key=lambda entry: struct.unpack("<H", entry[:2]))
    data = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + b"".join(entries) + bytes(4)
    file = io.BytesIO()
    PILImage.fromarray(PIXELS).save(file, "JPEG", quality=95, exif=data)
    plain = np.asarray(PILImage.open(io.BytesIO(encoded("JPEG", quality=95))))
    np.testing.assert_array_equal(upright(file.getvalue()), np.rot90(plain, -1))


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_images_with_changed_metadata_bytes_are_loaded(format):
    rng = np.random.default_rng(0)
    parts = exif(1).removeprefix(b"Exif\0\0"), xmp(1).encode(), b"profile" * 30
    data = encoded(format, exif=exif(1), xmp=parts[1], icc_profile=parts[2])
    offsets = [data.index(part) + offset for part in parts for offset in range(len(part))]
    for _ in range(300):
        changed = bytearray(data)
        for offset in rng.choice(offsets, 4):
            changed[offset] = rng.integers(256)
        assert upright(bytes(changed)).size == PIXELS.size


def test_decompression_bombs_are_rejected(monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(PILImage.DecompressionBombError):
        upright(encoded("PNG"))
    with pytest.raises(PILImage.DecompressionBombError):
        upright(with_chunk(*CHUNKS["a text bomb"]))


def png16(array, color):
    """Return a PNG of 16 bits per channel: `color` is 2 for RGB, 4 for gray with alpha, 6 for RGBA."""
    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    chunks.append((b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(parts), "path": None}


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_lost_16_bit_depth_is_rejected_with_16_bit_levels_and_logged_otherwise(tmp_path, color, channels):
    row = png16(np.full((8, 8, channels), 65535, np.uint16) - 255, color)
    with pytest.raises(ValueError, match="16-bit color or transparency, which PIL reads with 8 bits"):
        fit(row, image_format(8, 1, levels=65536))
    notes = []
    fit(row, image_format(8, 3), notes)
    assert notes == ["16 bits per channel are read as 8"]
    plain = {"bytes": encoded("PNG"), "path": None}
    dataset = Dataset.from_parquet(parquet(tmp_path / "a.parquet", image=[row, row, plain]))
    for _ in range(2):  # the second time from the cache
        lines = []
        decode(dataset, "image", image_format(6, 3), range(3), log=lines.append)
        assert lines == ["16 bits per channel are read as 8: 2 images"]


@pytest.mark.parametrize(
    ("options", "gray"), [({}, 65535), ({"background": "black"}, 0), ({"background": "#808080"}, 128 * 257),
                          ({"background": "blue"}, 29 * 257)])  # fmt: skip
def test_transparent_16_bit_gray_shows_background_in_gray(options, gray):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    file = io.BytesIO()
    PILImage.fromarray(levels).save(file, "PNG", transparency=5000)
    (pixels,) = fit({"bytes": file.getvalue(), "path": None}, image_format(8, 1, levels=65536, **options))
    np.testing.assert_array_equal(pixels, np.where(levels == 5000, gray, levels))


def test_small_images_are_enlarged_only_with_enlarge(tmp_path):
    folder = str(write_images(tmp_path / "images", size=(4, 4)))
    message = r"size 4x4 is smaller than the resolution 8x8 \(height x width\); use --enlarge true to upscale"
    with pytest.raises(ValueError, match=message):
        load(folder, channels=3)
    assert len(load(folder, channels=3, enlarge=True)) == 3
    flat = {"bytes": encoded("PNG"), "path": None}
    for crop in ("center", "random"):
        pixels = fit(flat, image_format((12, 12), 3, enlarge=True, crop=crop))
        assert pixels.shape == ((3, 12, 12) if crop == "center" else (3, 12, 18))
    means = [fit(flat, image_format((6, 9), 3)).mean(), fit(flat, image_format((12, 18), 3, enlarge=True)).mean()]
    assert means[0] == pytest.approx(means[1], abs=2)  # the same image, twice as large
    # Also with only one side too small.
    assert fit(flat, image_format((7, 4), 3, enlarge=True)).shape == (3, 7, 4)
