import io
import os

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from hf_ddpm.data.batches import ShuffledImages
from hf_ddpm.data.transforms import crop_at, fit
from tests.data.files import image_format, load, parquet, png, stream


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return {"bytes": file.getvalue(), "path": None}


def tiff(*pages):
    file = io.BytesIO()
    first, *others = [PILImage.fromarray(page) for page in pages]
    first.save(file, "TIFF", save_all=True, append_images=others)
    return {"bytes": file.getvalue(), "path": None}


def images_of(path, channels, **options):
    store = load(path, resolution=options.pop("resolution", 8), channels=channels, **options)
    return store[torch.arange(len(store))].numpy()


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 13])
def test_arrays_with_any_number_of_channels_are_loaded_unchanged(tmp_path, channels):
    arrays = noise(3, 8, 10, channels)
    np.save(tmp_path / "a.npy", arrays[0])
    np.save(tmp_path / "b.npy", arrays[1].transpose(2, 0, 1))
    np.savez(tmp_path / "c.npz", picture=np.asfortranarray(arrays[2]))
    np.testing.assert_array_equal(images_of(tmp_path, channels, resolution=(8, 10)), arrays.transpose(0, 3, 1, 2))


def test_gray_arrays_need_no_channel_axis(tmp_path):
    gray = noise(8, 8)
    np.save(tmp_path / "a.npy", gray)
    np.testing.assert_array_equal(images_of(tmp_path, 1)[0, 0], gray)
    with pytest.raises(ValueError, match=r"array of shape \(8, 8\) does not have --channels 8; expected \(H, W, 8\)"):
        images_of(tmp_path, 8)


def test_channels_are_last_axis_if_ambiguous():
    array = noise(6, 7, 6)
    np.testing.assert_array_equal(fit(npy(array), image_format((6, 7), 6)), array.transpose(2, 0, 1))


def test_files_with_four_dimensions_contain_many_images(tmp_path):
    arrays = noise(7, 8, 8, 5)
    np.savez(tmp_path / "a.npz", labels=np.arange(3), arr_0=arrays[:3])
    np.savez_compressed(tmp_path / "b.npz", arrays[3:5])
    np.save(tmp_path / "c.npy", arrays[5:])
    expected = arrays.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images_of(tmp_path, 5), expected)
    np.testing.assert_array_equal(images_of(tmp_path / "a.npz", 5), expected[:3])
    np.testing.assert_array_equal(images_of(tmp_path / "c.npy", 5), expected[5:])


def test_changed_file_is_read_again(tmp_path):
    for seed in range(2):
        arrays = noise(3, 8, 8, 2, seed=seed)
        np.save(tmp_path / "a.npy", arrays[0])
        np.savez(tmp_path / "b.npz", arrays[1:])
        np.testing.assert_array_equal(images_of(tmp_path, 2), arrays.transpose(0, 3, 1, 2))


def test_array_folders_have_same_splits_and_classes_as_image_folders(tmp_path):
    for split, first in [("train", 0), ("test", 100)]:
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            np.save(folder / "a.npy", np.full((8, 8, 2), first + label, np.uint8))
            np.savez(folder / "b.npz", np.full((2, 8, 8, 2), first + 10 + label, np.uint8))
    for split, first in [("train", 0), ("test", 100)]:
        store = load(tmp_path, split=split, channels=2, class_column="auto")
        assert store.class_names == ("cat", "dog") and store.labels.tolist() == [0, 0, 0, 1, 1, 1]
        values = store[torch.arange(6)][:, 0, 0, 0].tolist()
        assert values == [first, first + 10, first + 10, first + 1, first + 11, first + 11]
        batch = ShuffledImages(store, seed=0, batch_size=6).batch(0, slice(0, 6))
        assert (batch.images[:, 0, 0, 0] % 2).tolist() == batch.labels.tolist()


def test_splits_without_class_folders_have_no_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "a.npy", noise(8, 8, 2))
    with pytest.raises(ValueError, match="no class column recognized"):
        images_of(tmp_path, 2, class_column="auto")
    assert len(images_of(tmp_path, 2, split="test")) == 1
    with pytest.raises(ValueError, match="no split 'validation'; expected one of train, test"):
        images_of(tmp_path, 2, split="validation")


def test_links_to_arrays_are_followed_and_hidden_files_are_ignored(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "elsewhere" / "a.npy", noise(8, 8, 2))
    np.save(tmp_path / "data" / "._b.npy", noise(8, 8, 3))
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "elsewhere" / "up")
    assert len(images_of(tmp_path / "data", 2)) == 1


def test_arrays_next_to_image_files_are_ignored(tmp_path):
    PILImage.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
    np.save(tmp_path / "features.npy", np.zeros((100, 64)))
    assert images_of(tmp_path, 3)[:, :, 0, 0].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (19, 31)])
def test_arrays_are_resized_and_cropped_as_image_files_are(size, crop):
    array = noise(*size, 3)
    target = image_format(8, 3, crop=crop)
    expected = fit(png(array), target)
    np.testing.assert_array_equal(fit(npy(array), target), expected)
    six = fit(npy(np.concatenate([array, array[..., ::-1]], axis=2)), image_format(8, 6, crop=crop))
    np.testing.assert_array_equal(six, np.concatenate([expected, expected[::-1]]))
    np.testing.assert_array_equal(crop_at(six, target, (0.5, 0.5))[:3], crop_at(expected, target, (0.5, 0.5)))


# At half the size, the frequency of a one-pixel checkerboard cannot be represented: only its mean remains.
@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("levels", [256, 65536])
@pytest.mark.parametrize("encode", [npy, png])
def test_checkerboard_at_half_size_is_gray(crop, levels, encode):
    dtype = np.uint16 if levels > 256 else np.uint8
    white = np.iinfo(dtype).max
    board = (np.indices((64, 64)).sum(axis=0) % 2 * white).astype(dtype)
    (pixels,) = fit(encode(board), image_format(32, 1, levels=levels, crop=crop))
    np.testing.assert_allclose(pixels[4:-4, 4:-4] / white, 0.5, atol=0.01)


def test_16_bits_are_kept_with_any_number_of_channels(tmp_path):
    deep = noise(8, 8, 5, dtype=np.uint16)
    np.save(tmp_path / "a.npy", deep)
    np.save(tmp_path / "b.npy", deep.astype(">u2"))
    np.save(tmp_path / "c.npy", (deep >> 8).astype(np.uint8))
    images = images_of(tmp_path, 5, levels=65536)
    assert images.dtype == np.uint16
    for image, expected in zip(images, [deep, deep, (deep >> 8) * 257], strict=True):
        np.testing.assert_array_equal(image, expected.transpose(2, 0, 1))
    with pytest.raises(
        ValueError, match="more than 8 bits per channel .dtype uint16.; use --levels 65536 to keep them"
    ):
        images_of(tmp_path, 5)
    with pytest.raises(ValueError, match="expected an array or a TIFF of 3 pages for 16 bits"):
        fit(png(noise(8, 8, 3)), image_format(8, 3, levels=65536))


@pytest.mark.parametrize("levels", [256, 65536])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_scaled_by_value_range(levels, dtype):
    white = 65535 if levels > 256 else 255
    values = np.linspace(-2, 3, 128).reshape(8, 8, 2).astype(dtype)
    pixels = fit(npy(values), image_format(8, 2, levels=levels, value_range=(-2, 3)))
    expected = (values.astype(float) + 2) / 5 * white
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=0.5 + white * 2**-22)
    assert pixels.min() == 0 and pixels.max() == white and pixels.dtype == (np.uint16 if levels > 256 else np.uint8)


def test_floats_are_resized_before_they_are_rounded():
    values = np.full((16, 16), 0.4 / 255, np.float32)
    values[::2] = 0.8 / 255  # the mean, 0.6 / 255, rounds to 1; rounding first would give rows of 0 and 1
    (pixels,) = fit(npy(values[..., None]), image_format(8, 1, value_range=(0, 1)))
    assert (pixels[2:-2] == 1).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("levels", [256, 65536])
def test_float_images_with_value_range_are_grayscale_images(channels, levels):
    white = 65535 if levels > 256 else 255
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(ValueError, match="image has floats .dtype float32.; use --value_range LOW HIGH"):
        fit(tiff(values), image_format(8, channels, levels=levels))
    pixels = fit(tiff(values), image_format(8, channels, levels=levels, value_range=(0, 1)))
    message = "grayscale image does not have --channels 5; expected an array of 5 channels, or a TIFF of 5 pages"
    with pytest.raises(ValueError, match=message):
        fit(tiff(values), image_format(channels=5, levels=levels, value_range=(0, 1)))
    gray = np.rint(values.astype(float) * white)
    for channel in range(channels):
        np.testing.assert_allclose(pixels[channel], white if channel == 3 else gray, atol=1 if levels > 256 else 0)


def test_true_becomes_white(tmp_path):
    np.save(tmp_path / "a.npy", noise(8, 8, 2) > 100)
    np.testing.assert_array_equal(images_of(tmp_path, 2)[0] == 255, np.load(tmp_path / "a.npy").transpose(2, 0, 1))
    assert set(images_of(tmp_path, 2, levels=65536).flatten()) == {0, 65535}


@pytest.mark.parametrize(
    "page", [noise(8, 9), noise(8, 9, dtype=np.uint16), noise(8, 9).astype(np.float32), noise(8, 9) > 99]
)
def test_gray_pages_of_tiff_are_channels(page):  # fmt: skip
    pages = [page, page[::-1], page[:, ::-1], page, page]
    target = image_format((8, 9), 5, levels=65536, value_range=(0, 255))
    np.testing.assert_array_equal(fit(tiff(*pages), target), fit(npy(np.stack(pages, axis=2)), target))
    with pytest.raises(ValueError, match="image has 5 gray pages but --channels is 1; expected --channels 5"):
        fit(tiff(*pages), image_format((8, 9), 1))


def test_pages_of_another_size_or_in_color_are_not_channels():
    color = noise(8, 8, 3)
    np.testing.assert_array_equal(fit(tiff(color, color), image_format(8, 3)), color.transpose(2, 0, 1))
    gray = noise(8, 8)
    np.testing.assert_array_equal(fit(tiff(gray, gray[:4, :4]), image_format(8, 1))[0], gray)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [(npy(noise(8, 8, 6)), {"channels": 3}, r"shape \(8, 8, 6\) does not have --channels 3; expected \(H, W, 3\)"),
     (npy(noise(8, 8, 3)), {"channels": 1}, r"shape \(8, 8, 3\) does not have --channels 1"),
     (npy(noise(8)), {"channels": 1}, r"shape \(8,\) does not have --channels 1"),
     (npy(noise(2, 8, 8, 3)), {"channels": 3}, r"shape \(2, 8, 8, 3\) does not have --channels 3"),
     (npy(noise(8, 0, 3)), {"channels": 3}, "size 8x0 is smaller than the resolution 8x8"),
     (npy(noise(7, 9, 3)), {"channels": 3}, "size 7x9 is smaller than the resolution 8x8"),
     (npy(noise(8, 8, 2, dtype=np.int64)), {"channels": 2}, "dtype int64 is not supported; expected uint8, uint16"),
     (npy(noise(8, 8, 2, dtype=np.int8)), {"channels": 2}, "dtype int8 is not supported"),
     (npy(noise(8, 8, 2) * 1j), {"channels": 2}, "dtype complex128 is not supported"),
     (npy(np.full((8, 8, 2), "a")), {"channels": 2}, "dtype <U1 is not supported"),
     (npy(np.full((8, 8, 2), None)), {"channels": 2}, "Object arrays cannot be loaded"),
     (npy(np.full((8, 8, 2), 0.5)), {"channels": 2}, "floats .dtype float64.; use --value_range LOW HIGH"),
     (npy(np.full((8, 8, 2), 1.5)), {"channels": 2, "value_range": (0, 1)}, "1.5 to 1.5 are outside --value_range 0 1"),
     (npy(np.full((8, 8, 2), np.nan)), {"channels": 2, "value_range": (0, 1)}, "values that are not finite"),
     (png(noise(8, 8, 3)), {"channels": 6}, "mode RGB does not have --channels 6; expected an array"),
     (png(noise(8, 8)), {"channels": 2}, "mode L does not have --channels 2; expected an array")],
)  # fmt: skip
def test_images_that_do_not_match_format_are_rejected(row, options, message):
    with pytest.raises(ValueError, match=message):
        fit(row, image_format(8, **options))


@pytest.mark.parametrize("limits", [(1, 0), (0, 0), (0,), (0, float("inf")), (float("nan"), 1)])
def test_value_range_is_two_finite_numbers(limits):
    message = r"value_range.*expected (two finite numbers LOW HIGH|a list of a finite number)"
    with pytest.raises(ValueError, match=message):
        image_format(8, 1, value_range=limits)


def test_damaged_files_are_reported_as_bad_images(tmp_path):
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, noise(8, 8, 2))
    np.savez(tmp_path / "c.npz", noise(8, 8, 2), noise(8, 8, 2))
    np.savez(tmp_path / "d.npz", noise(3, 8, 8, 2))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-1])
    (tmp_path / "d.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:-1])
    (tmp_path / "e.npy").write_text("no array")
    (tmp_path / "f.npz").write_bytes(b"")
    report = tmp_path / "report.jsonl"
    assert len(images_of(tmp_path, 2, skip_bad_images=True, report=report)) == 1
    lines = report.read_text().splitlines()
    assert [name in line for name, line in zip(("b.npy", "c.npz", "d.npz", "e.npy", "f.npz"), lines, strict=True)]
    assert "arr_0 (8, 8, 2), arr_1 (8, 8, 2); expected one" in lines[1]


def test_flipped_bit_in_file_of_many_images_is_detected(tmp_path):
    np.savez(tmp_path / "a.npz", noise(3, 64, 64, 2))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"--dataset .*: cannot be read: .*a\.npz: cannot be read .*Bad CRC-32"):
        images_of(tmp_path / "a.npz", 2)


def test_arrays_in_parquet_are_loaded_and_streamed(tmp_path):
    arrays = noise(6, 8, 8, 5)
    file = parquet(tmp_path / "train.parquet", image=[npy(array) for array in arrays])
    np.testing.assert_array_equal(images_of(file, 5), arrays.transpose(0, 3, 1, 2))
    source = stream(file, seed=0, batch_size=6, channels=5, workers=0)
    batch = source.batch(0, slice(0, 6)).images.numpy()
    source.close()
    assert {image.tobytes() for image in batch} == {image.tobytes() for image in arrays.transpose(0, 3, 1, 2)}


def test_array_folders_cannot_be_streamed(tmp_path):
    np.save(tmp_path / "a.npy", noise(8, 8, 2))
    with pytest.raises(ValueError, match="cannot be streamed") as caught:
        stream(str(tmp_path), seed=0, batch_size=1, channels=2)
    assert "\n" not in str(caught.value)


def test_several_stacks_in_file_are_rejected_unless_one_is_arr_0(tmp_path):
    stacks = {"x_test": np.zeros((3, 8, 8, 1), np.uint8), "x_train": np.zeros((9, 8, 8, 1), np.uint8)}
    np.savez(tmp_path / "two.npz", **stacks)
    message = r"several arrays have 4 dimensions \(x_test, x_train\); expected one, or the name arr_0"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "two.npz")
    np.savez(tmp_path / "named.npz", labels=np.zeros((4, 1, 1, 1)), arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    assert len(load(tmp_path / "named.npz")) == 4
