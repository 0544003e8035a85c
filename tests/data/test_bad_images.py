import json

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from hf_ddpm.data.batches import ShuffledImages
from tests.data.files import load, numbered, parquet, write_images


@pytest.fixture
def folder_with_bad_images(tmp_path):
    """A folder of seven images, three of them bad."""
    folder = write_images(tmp_path / "images", count=4)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PILImage.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "text.png").write_text("not an image")
    (folder / "void.png").write_bytes(b"")
    return folder


def test_error_for_first_bad_image_is_one_line(folder_with_bad_images):
    with pytest.raises(ValueError, match=r"^row 4 \(.*cut\.jpg\): .*truncated.*use --skip_bad_images true"):
        load(folder_with_bad_images, channels=3)


def test_error_for_bad_image_names_its_row_in_dataset(folder_with_bad_images):
    rows = {"cut.jpg": 4, "text.png": 5, "void.png": 6}
    for seed in range(3):
        with pytest.raises(ValueError, match="skip unusable images") as caught:
            load(folder_with_bad_images, channels=3, max_train_samples=6, seed=seed)
        (row,) = [row for name, row in rows.items() if name in str(caught.value)]
        assert str(caught.value).startswith(f"row {row} (")


@pytest.mark.parametrize("again", [False, True])  # the second time from the cache
def test_skipped_images_are_counted_and_reported(folder_with_bad_images, tmp_path, again):
    report = tmp_path / "report.jsonl"
    for _ in range(1 + again):
        report.unlink(missing_ok=True)
        images = load(folder_with_bad_images, channels=3, skip_bad_images=True, report=report)
    assert len(images) == 4 and images.skipped == 3
    good = [np.asarray(PILImage.open(folder_with_bad_images / f"{i}.png")) for i in range(4)]
    np.testing.assert_array_equal(images[torch.arange(4)].numpy(), np.stack(good).transpose(0, 3, 1, 2))
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(line["row"], line["file"].rsplit("/")[-1]) for line in lines] == [
        (4, "cut.jpg"), (5, "text.png"), (6, "void.png")]  # fmt: skip
    assert "truncated" in lines[0]["reason"] and all("\n" not in line["reason"] for line in lines)


def test_labels_match_their_images_after_skipping(tmp_path):
    images = [numbered(i) for i in range(10)]
    images[2] = {"bytes": b"nothing", "path": "x"}
    images[7] = None
    file = parquet(tmp_path / "a.parquet", image=images, label=list(range(10)))
    report = tmp_path / "report.jsonl"
    store = load(file, class_column="label", skip_bad_images=True, report=report, max_train_samples=9, seed=1)
    values = store[torch.arange(len(store))][:, 0, 0, 0].tolist()
    assert [int(store.class_names[label]) for label in store.labels] == values
    # Row numbers refer to the dataset, not to the random sample.
    unused_files = [json.loads(line)["row"] for line in report.read_text().splitlines()]
    assert unused_files == [2, 7] and min(set(range(10)) - {*unused_files, *values}) < 7
    assert len(values) + store.skipped == 9
    source = ShuffledImages(store, seed=0, batch_size=5)
    for step in range(4):
        batch = source.batch(step, slice(0, 5))
        assert [int(store.class_names[label]) for label in batch.labels] == batch.images[:, 0, 0, 0].tolist()


def test_dataset_of_only_bad_images_is_rejected(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("nothing")
    with pytest.raises(ValueError, match=r"all images are unusable \(3\), the first one in row 0 \(.*0\.png\): "):
        load(tmp_path, channels=3, skip_bad_images=True)


def test_too_small_images_are_bad_images(tmp_path):
    folder = write_images(tmp_path / "images", count=2)
    PILImage.new("RGB", (7, 30)).save(folder / "small.png")
    assert len(load(folder, channels=3, skip_bad_images=True)) == 2
