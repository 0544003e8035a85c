import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from hf_ddpm.data import store
from hf_ddpm.data.columns import find_image_column
from tests.data.files import load, opened, parquet, png, write_images


def test_digits_equal_those_of_scikit_learn():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(1797)
    for split, rows in [("train", order[:898]), ("test", order[898:])]:
        images = load("digits", split=split)
        expected = np.round(digits.images[rows] * 255 / 16).astype(np.uint8)
        np.testing.assert_array_equal(images[torch.arange(len(images))][:, 0].numpy(), expected)
        assert opened("digits", split=split)[0]["label"] == digits.target[rows].tolist()


@pytest.mark.parametrize("resident", [True, False])
def test_batches_contain_requested_images(monkeypatch, resident):
    if not resident:
        monkeypatch.setattr(store, "RESIDENT_BYTES", 0)
    images = load("digits")
    pictures = opened("digits")[0]["image"]
    batch = images[torch.tensor([5, 0, 5])]
    assert batch.shape == (3, 1, 8, 8) and batch.dtype == torch.uint8
    for row, index in zip(batch, [5, 0, 5], strict=True):
        np.testing.assert_array_equal(row[0].numpy(), np.asarray(pictures[index]))


def test_image_folders_and_parquet_files_load_same_images(tmp_path):
    folder = write_images(tmp_path / "images", count=4)
    from_folder = load(folder, channels=3)
    arrays = [np.asarray(PILImage.open(folder / f"{i}.png")) for i in range(4)]
    (tmp_path / "table").mkdir()
    file = parquet(tmp_path / "table" / "train.parquet", img=[png(array) for array in arrays], label=[0, 1, 2, 3])
    for images in (from_folder, load(file, channels=3),
                   load(tmp_path / "table", channels=3)):  # fmt: skip
        np.testing.assert_array_equal(images[torch.arange(4)].numpy(), np.stack(arrays).transpose(0, 3, 1, 2))


def test_class_folders_may_have_any_names(tmp_path):
    # datasets would read testing/ as a split, and a text file next to images as data.
    tmp_path = tmp_path / "cats [8px]"  # not a glob pattern
    for name in ("testing", "training_set", "other"):
        write_images(tmp_path / name, count=2)
    (tmp_path / "notes.txt").write_text("not an image")
    assert len(load(tmp_path, channels=3)) == 6


def test_folders_with_split_names_are_splits(tmp_path):
    write_images(tmp_path / "train" / "cat", count=3)
    write_images(tmp_path / "test" / "cat", count=2)
    assert len(load(tmp_path, channels=3)) == 3
    assert len(load(tmp_path, split="test", channels=3)) == 2


def test_transparent_pixels_are_white(tmp_path):
    PILImage.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    rgb = load(tmp_path, channels=3)[torch.tensor([0])]
    assert bool((rgb == 255).all())
    rgba = load(tmp_path, channels=4)[torch.tensor([0])]
    assert rgba[0, :, 0, 0].tolist() == [255, 0, 0, 0]


def test_palettes_and_cmyk_are_converted(tmp_path):
    color = PILImage.new("RGB", (16, 16), (200, 40, 40))
    color.convert("P").save(tmp_path / "a.png")
    color.convert("CMYK").save(tmp_path / "b.jpg", quality=100)
    images = load(tmp_path, channels=3)[torch.arange(2)]
    expected = torch.tensor([200.0, 40.0, 40.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    torch.testing.assert_close(images.float(), expected, rtol=0, atol=12)  # the palette has 216 colors


def test_images_are_cropped_resized_and_converted(tmp_path):
    left, right = np.zeros((16, 12, 3), np.uint8), np.full((16, 12, 3), 255, np.uint8)
    PILImage.fromarray(np.concatenate([left, right], axis=1)).save(tmp_path / "a.png")  # 24 x 16: black, white
    (gray,) = load(tmp_path)[torch.tensor([0])]
    assert gray.shape == (1, 8, 8)
    assert gray[0, :, 0].max() <= 2 and gray[0, :, -1].min() >= 253  # the central square at half its size
    rgba = load(tmp_path, resolution=16, channels=4)[torch.tensor([0])]
    assert rgba.shape == (1, 4, 16, 16) and bool((rgba[0, 3] == 255).all())


def test_exif_orientation_is_applied(tmp_path):
    picture = PILImage.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    exif = PILImage.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    image = load(tmp_path)[torch.tensor([0])]
    np.testing.assert_array_equal(image[0, 0].numpy(), np.asarray(picture)[::-1, ::-1])


def test_image_columns_are_guessed_or_given(tmp_path):
    pixel = png(np.zeros((8, 8), np.uint8))

    def columns(name, **values):
        return opened(parquet(tmp_path / name, **values))[0].features

    two = columns("two.parquet", left=[pixel], right=[pixel], label=[1])
    assert find_image_column(two, "right") == "right"
    with pytest.raises(ValueError, match=r"set --image_column; the columns are left \(Image\), right \(Image\), label"):
        find_image_column(two)
    with pytest.raises(ValueError, match="--image_column up: there is no such column; the columns are left"):
        find_image_column(two, "up")
    with pytest.raises(ValueError, match="--image_column label: the column has no images"):
        find_image_column(two, "label")
    assert find_image_column(columns("one.parquet", scan=[pixel], mask=[0])) == "scan"
    assert find_image_column(columns("usual.parquet", mask=[pixel], img=[pixel])) == "img"


def test_errors_for_missing_and_empty_datasets_name_them(tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    for name, message in [
        ("./nowhere", "--dataset ./nowhere: does not exist; expected a folder, a file, a Hub id or digits"),
        ("a/b/c", "--dataset a/b/c: does not exist"),
        (str(tmp_path / "nowhere"), "does not exist"),
        (
            "somebody/something",
            "--dataset somebody/something: does not exist.*; expected a folder, a file, a Hub id or digits",
        ),
        (str(tmp_path / "note.txt"), "unknown format; expected a parquet, .npy or .npz file, or an archive"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(name, channels=3)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="bad.parquet: cannot be read: Parquet magic bytes not found"):
        load(tmp_path / "bad.parquet", channels=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: folder contains no images"):
        load(tmp_path / "empty", channels=3)
    with pytest.raises(ValueError, match="--dataset digits: no split 'validation'; expected one of train, test"):
        load("digits", split="validation")


UNUSABLE = {
    "text": (lambda file: file.write_bytes(b"not an image"), "not an image of a known format"),
    "cut": (lambda file: file.write_bytes((file.parent / "0.png").read_bytes()[:90]), "truncated|broken|unrecognized"),
    "small": (lambda file: PILImage.new("RGB", (7, 30)).save(file), "size 30x7 is smaller than the resolution 8x8"),
    "deep": (lambda file: PILImage.fromarray(np.full((8, 8), 40_000, np.uint16)).save(file), "more than 8 bits"),
}


@pytest.mark.parametrize(("spoil", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_errors_for_unusable_images_name_row_file_and_reason(tmp_path, spoil, reason):
    folder = write_images(tmp_path / "images")
    spoil(folder / "x.png")
    with pytest.raises(ValueError, match=rf"^row 3 \(.*x\.png\): .*({reason})"):
        load(folder, channels=3)


def test_error_for_missing_image_names_its_row(tmp_path):
    features = Features({"image": Image()})
    data = Dataset.from_dict({"image": [png(np.zeros((8, 8), np.uint8)), None]}, features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"^row 1 \(column 'image'\): image is missing"):
        load(tmp_path / "a.parquet")
