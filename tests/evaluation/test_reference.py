import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_ddpm.evaluation.feature_cache
from hf_ddpm.evaluation.extraction import BATCH_SIZE, Processes, extract, extract_share, in_order
from hf_ddpm.evaluation.feature_cache import fingerprint, reference_features
from hf_ddpm.evaluation.features import Extracted, Extractor, load_extractor
from hf_ddpm.evaluation.pictures import copied_fraction, nearest_picture


class Pixels:
    """Random images by number, in memory."""

    def __init__(self, count, shape=(1, 8, 8), seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
        self.shape = shape

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, numbers):
        return self.pixels[numbers]


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


class BatchDependent(Extractor):
    """Features that tell which images they were extracted with: the sum of the batch."""

    name, checksum, device = "sums", "sums", torch.device("cpu")

    def __init__(self):
        pass

    def _extract(self, pixels):
        sums = pixels.flatten(1).float().sum(dim=1, keepdim=True)
        return Extracted(torch.cat([sums, sums.sum().expand_as(sums)], dim=1))


@pytest.mark.parametrize("count", [1, BATCH_SIZE, 3 * BATCH_SIZE + 5])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_features_are_the_same_for_any_number_of_processes(count, world):
    # Even of an extractor whose features depend on the batch: the batches are the same.
    images, numbers = Pixels(300), range(10, 10 + count)
    shares = [extract_share(BatchDependent(), images, numbers, rank, world)[0] for rank in range(world)]
    assert len({share.shape for share in shares}) == 1  # or they could not be gathered
    expected = [
        row
        for start in range(0, count, BATCH_SIZE)
        for row in BatchDependent()(images[torch.tensor(numbers[start : start + BATCH_SIZE])]).features
    ]
    assert torch.equal(in_order(torch.cat(shares), count, world), torch.stack(expected))
    every = Processes(0, world, lambda rows: torch.cat(shares))
    assert torch.equal(extract(BatchDependent(), images, numbers, every).features, torch.stack(expected))


def test_probabilities_come_with_the_features(extractor):
    images = Pixels(100)
    extracted, whole = extract(extractor, images, range(100), Processes()), extractor(images.pixels)
    torch.testing.assert_close(extracted.features, whole.features)
    torch.testing.assert_close(extracted.probabilities, whole.probabilities)


def test_a_fingerprint_is_of_the_pixels_in_their_order():
    one, same, other = Pixels(70), Pixels(70), Pixels(70)
    other.pixels[69, 0, 7, 7] ^= 1
    assert fingerprint(one, range(70)) == fingerprint(same, range(70))
    prints = {fingerprint(one, range(70)), fingerprint(other, range(70)), fingerprint(one, range(69))}
    prints.add(fingerprint(one, range(69, -1, -1)))
    one.pixels = one.pixels.view(70, 1, 4, 16)
    one.shape = (1, 4, 16)
    assert len(prints | {fingerprint(one, range(70))}) == 5


@pytest.fixture
def extractions(monkeypatch):
    """Counts how often features are really extracted."""
    calls = []
    monkeypatch.setattr(hf_ddpm.evaluation.feature_cache, "extract", lambda *args: (calls.append(1), extract(*args))[1])
    return calls


def features(extractor, images, cache, **more):
    numbers = range(len(images))
    data = fingerprint(images, numbers)
    return reference_features(extractor, images, numbers, data, more.pop("processes", Processes()), cache)


def test_the_features_of_a_reference_are_extracted_once(extractor, extractions, tmp_path):
    images = Pixels(70)
    first, again = features(extractor, images, tmp_path), features(extractor, Pixels(70), tmp_path)
    assert len(extractions) == 1 and torch.equal(first, again)
    features(extractor, Pixels(70, seed=1), tmp_path)
    features(extractor, Pixels(69), tmp_path)
    assert len(extractions) == 3 and len(list(tmp_path.iterdir())) == 3


def test_other_weights_and_other_recipes_have_a_place_of_their_own(extractions, tmp_path):
    images, extractor = Pixels(5), load_extractor("digits")
    features(extractor, images, tmp_path)
    extractor.recipe = "other"
    features(extractor, images, tmp_path)
    extractor.checksum = "other"
    features(extractor, images, tmp_path)
    assert len(extractions) == 3


def change_a_feature(path):
    with_metadata = {"key": path.stem, "sha256": "0" * 64}
    tensors = load_file(path)
    tensors["features"][0, 0] += 1
    save_file(tensors, path, metadata=with_metadata)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("nothing of the kind"),
        lambda path: save_file({"other": torch.zeros(1)}, path),
        change_a_feature,
        flip_a_bit,
    ],
)
def test_a_damaged_cache_is_made_anew(extractor, extractions, tmp_path, damage):
    images = Pixels(70)
    first = features(extractor, images, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    assert torch.equal(features(extractor, images, tmp_path), first) and len(extractions) == 2
    assert torch.equal(features(extractor, images, tmp_path), first) and len(extractions) == 2


def test_a_file_that_belongs_to_another_key_is_not_taken(extractor, extractions, tmp_path):
    features(extractor, Pixels(70), tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.unlink()
    expected = features(extractor, Pixels(70, seed=1), tmp_path)
    (other,) = tmp_path.iterdir()
    other.write_bytes(content)
    assert torch.equal(features(extractor, Pixels(70, seed=1), tmp_path), expected) and len(extractions) == 3


def test_a_process_without_the_cache_makes_all_extract(extractor, extractions, tmp_path):
    images = Pixels(70)
    features(extractor, images, tmp_path)
    lacks = lambda rows: rows * 0 if rows.dtype == torch.int64 else rows  # noqa: E731
    features(extractor, images, tmp_path, processes=Processes(0, 1, lacks))
    assert len(extractions) == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(extractor, tmp_path):
    (tmp_path / "file").write_text("")
    assert features(extractor, Pixels(5), tmp_path / "file").shape == (5, 64)


def test_copies_are_counted_on_the_values_that_pixels_take():
    reference, images = Pixels(50), Pixels(10, seed=1)
    assert copied_fraction(images, range(10), reference, 256) == 0
    images.pixels[3], images.pixels[7] = reference.pixels[49], reference.pixels[0]
    assert copied_fraction(images, range(10), reference, 256) == 0.2
    assert copied_fraction(images, range(4), reference, 256) == 0.25
    # Of 17 values, 255 / 16 apart, the nearest counts.
    reference.pixels[0], images.pixels[7] = 16, 23
    assert copied_fraction(images, range(10), reference, 17) == 0.2
    images.pixels[7, 0, 0, 0] = 24
    assert copied_fraction(images, range(10), reference, 17) == 0.1


def test_the_picture_shows_what_is_nearest_and_its_neighbors():
    # One-dimensional features by hand: generated 5 is 0.1 from real 2, generated 0 is 0.2 from real 7, others are far.
    reference, images = Pixels(8, (3, 64, 64)), Pixels(6, (3, 64, 64), seed=1)
    known = torch.tensor([0.0, 10, 20, 30, 40, 50, 60, 70]).unsqueeze(1)
    generated = torch.tensor([70.2, 14.85, 24.9, 34.8, 44.7, 20.1]).unsqueeze(1)
    sheet = np.asarray(nearest_picture(images, generated, reference, known))
    assert sheet.shape == (6 * 65 - 1, 4 * 65 - 1, 3)

    def tile(row, column):
        return sheet[65 * row : 65 * row + 64, 65 * column : 65 * column + 64].transpose(2, 0, 1)

    for row, number, neighbors in [(0, 5, (2, 3, 1)), (1, 0, (7, 6, 5)), (5, 2, (2, 3, 1))]:
        np.testing.assert_array_equal(tile(row, 0), images.pixels[number])
        for column, neighbor in enumerate(neighbors, start=1):
            np.testing.assert_array_equal(tile(row, column), reference.pixels[neighbor])
