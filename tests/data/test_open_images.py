"""Opening the images of a run, decoded in advance or as a stream."""

import json
from contextlib import contextmanager

import pytest
import torch

from hf_ddpm.data import open_images
from hf_ddpm.data.batches import ShuffledImages
from tests.data.files import data, load, numbered, shards, stream

ALL = slice(0, 6)


@contextmanager
def first(entered):
    entered.append("decoded")
    yield


def test_decoded_images_are_decoded_by_main_process_first_and_shuffled_by_seed(tmp_path):
    folder, entered = shards(tmp_path / "data", [numbered(i) for i in range(40)]), []
    options = {"class_column": "label", "max_train_samples": 20}
    images = open_images(data(folder, **options), seed=3, batch_size=6, device="cpu", main_process_first=first(entered))
    assert entered == ["decoded"]
    expected = ShuffledImages(load(folder, seed=3, **options), seed=3, batch_size=6)
    for step in range(8):
        batch, other = images.batch(step, ALL), expected.batch(step, ALL)
        assert torch.equal(batch.images, other.images) and torch.equal(batch.labels, other.labels)


def test_streams_are_not_decoded_in_advance_and_use_options(tmp_path):
    folder, entered = shards(tmp_path / "data", [numbered(i) for i in range(40)]), []
    options = {"class_column": "label", "max_train_samples": 20, "streaming": True}
    images = open_images(data(folder, **options), seed=3, batch_size=6, device="cpu", main_process_first=first(entered))
    expected = stream(folder, seed=3, batch_size=6, **options)
    assert entered == [] and len(images) == 20 and images.class_names == ("a", "b", "c")
    for step in range(4):
        batch, other = images.batch(step, ALL), expected.batch(step, ALL)
        assert torch.equal(batch.images, other.images) and torch.equal(batch.labels, other.labels)
    images.close()
    expected.close()


@pytest.mark.parametrize("streaming", [True, False])
def test_report_is_written_only_if_bad_images_are_skipped(tmp_path, streaming):
    folder, report = shards(tmp_path / "data", [numbered(i) for i in range(8)]), tmp_path / "report.jsonl"
    (folder / "notes.md").write_text("not an image")
    for skip in (False, True):
        options = data(folder, streaming=streaming, skip_bad_images=skip)
        open_images(
            options, seed=0, batch_size=6, device="cpu", main_process_first=first([]), report=report
        ).close()  # fmt: skip
        assert report.exists() == skip
    (line,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert line["file"].endswith("notes.md") and line["row"] is None
