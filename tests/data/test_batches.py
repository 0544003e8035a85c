import threading

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from hf_ddpm.data.batches import ShuffledImages, _epoch_order, batch_indices, crop_positions
from hf_ddpm.data.sources import choose
from hf_ddpm.data.transforms import crop_at
from tests.data.files import load, numbered, parquet


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("numbered") / "a.parquet"
    return load(parquet(path, image=[numbered(i) for i in range(50)]))


def test_batches_follow_batch_indices(store):
    source = ShuffledImages(store, seed=3, batch_size=16)
    for step in (0, 1, 2, 100):
        batch = source.batch(step, slice(0, 16))
        assert torch.equal(batch.images, store[batch_indices(3, step, 16, 50)])
        assert batch.labels is None
        parts = [source.batch(step, slice(start, start + 4)).images for start in range(0, 16, 4)]
        assert torch.equal(torch.cat(parts), batch.images)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Images wider or higher than 6 x 4; the pixels encode the index of the image and their position."""
    folder = tmp_path_factory.mktemp("wide")
    for i, (height, width) in enumerate([(6, 4), (6, 9), (11, 4), (6, 7)]):
        positions = np.arange(height * width, dtype=np.uint8).reshape(height, width)
        PILImage.fromarray(np.stack([positions, np.full_like(positions, i), positions], axis=2)).save(
            folder / f"{i}.png"
        )
    return load(folder, resolution=(6, 4), channels=3, crop="random")


def test_random_crops_depend_only_on_seed_step_and_row(wide):
    source = ShuffledImages(wide, seed=0, batch_size=8)
    batches = [source.batch(step, slice(0, 8)).images for step in range(30)]
    assert all(torch.equal(batch, source.batch(step, slice(0, 8)).images) for step, batch in enumerate(batches))
    halves = [source.batch(7, rows).images for rows in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(halves), batches[7])
    seen = torch.cat(batches)
    corners = {(int(image[1, 0, 0]), int(image[0, 0, 0])) for image in seen}
    columns, rows = {(1, position) for position in range(6)}, {(2, position * 4) for position in range(6)}
    assert corners == {(0, 0)} | columns | rows | {(3, position) for position in range(4)}
    other = ShuffledImages(wide, seed=1, batch_size=8)
    assert not torch.equal(other.batch(0, slice(0, 8)).images, batches[0])


def test_crops_are_at_crop_places(wide):
    source = ShuffledImages(wide, seed=5, batch_size=4)
    positions = crop_positions(5, 9, 4)
    order = batch_indices(5, 9, 4, 4)
    sizes = [(6, 4), (6, 9), (11, 4), (6, 7)]
    for image, index, position in zip(
        source.batch(9, slice(0, 4)).images, order.tolist(), positions.tolist(), strict=True
    ):
        height, width = sizes[index]
        whole = np.arange(height * width).reshape(1, height, width)
        np.testing.assert_array_equal(image[0].numpy(), crop_at(whole, wide.image_format, position)[0])


def test_indexing_crops_at_center(wide):
    (image,) = wide[torch.tensor([1])]
    assert image[0, 0].tolist() == [2, 3, 4, 5] or image[0, 0].tolist() == [3, 4, 5, 6]


def test_max_train_samples_draws_by_seed(tmp_path):
    file = parquet(tmp_path / "a.parquet", image=[numbered(i) for i in range(40)])

    def values(**options):
        images = load(file, **options)
        return images[torch.arange(len(images))][:, 0, 0, 0].tolist()

    first = values(max_train_samples=10)
    assert len(set(first)) == 10 and first == sorted(first) and first != list(range(10))
    assert values(max_train_samples=10, seed=0) == first != values(max_train_samples=10, seed=1)
    assert values(max_train_samples=100) == list(range(40))
    with pytest.raises(ValueError, match="--max_train_samples 0: expected at least 1"):
        values(max_train_samples=0)
    with pytest.raises(ValueError, match="--max_samples 0: expected at least 1"):
        choose(40, 0, seed=0)


def test_each_epoch_is_another_permutation():
    # 50 images are not a multiple of the batch size 8, so some batches span two epochs.
    stream = torch.cat([batch_indices(0, step, 8, 50) for step in range(25)])
    epochs = stream.view(4, 50)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(stream[:8], batch_indices(1, 0, 8, 50))


def test_order_does_not_depend_on_batch_size():
    small = torch.cat([batch_indices(3, step, 4, 30) for step in range(30)])
    large = torch.cat([batch_indices(3, step, 40, 30) for step in range(3)])
    assert torch.equal(small, large)


@pytest.mark.parametrize("classes", [None, "label"])
def test_no_batch_waits_for_copy_to_device(classes, monkeypatch):
    # The meta device stands for a GPU. The order of an epoch is copied once.
    store = load("digits", resolution=[8], channels=1, class_column=classes, device="meta")
    source, copies, to = ShuffledImages(store, seed=0, batch_size=64), [], torch.Tensor.to
    _epoch_order.cache_clear()

    def count_copies(tensor, *args, **options):
        result = to(tensor, *args, **options)
        if result.device != tensor.device:
            copies.append(tensor.shape)
        return result

    monkeypatch.setattr(torch.Tensor, "to", count_copies)
    batches = [source.batch(step, slice(0, 64)) for step in range(15)]  # 898 images: the last batch spans two epochs
    assert copies == [(898,), (898,)] and all(batch.images.device.type == "meta" for batch in batches)
    assert [batch.labels is None for batch in batches] == [classes is None] * 15


def test_prefetched_batches_are_identical(wide):
    plain = ShuffledImages(wide, seed=0, batch_size=8)
    ahead, calls = ShuffledImages(wide, seed=0, batch_size=8, ahead=True), []
    read = ahead._batch
    ahead._batch = lambda step, rows: (calls.append((step, threading.current_thread().name)), read(step, rows))[1]
    whole, first = slice(0, 8), slice(0, 4)
    for step, rows in ((0, whole), (1, whole), (2, whole), (2, whole), (7, whole), (8, first)):
        assert torch.equal(ahead.batch(step, rows).images, plain.batch(step, rows).images)
    ahead.close()
    direct = [step for step, name in calls if name == threading.current_thread().name]
    assert direct == [0, 2, 7, 8]  # the steps whose batch was not prefetched
    assert plain.ahead is False


def test_errors_of_prefetching_are_raised_at_their_step(wide):
    source = ShuffledImages(wide, seed=0, batch_size=8, ahead=True)
    source.batch(0, slice(0, 8))
    source.batch(1, slice(0, 8))
    source._next[1].result()
    source._batch = lambda step, rows: 1 / 0
    source.batch(2, slice(0, 8))
    with pytest.raises(ZeroDivisionError):
        source.batch(3, slice(0, 8))
    source.close()
