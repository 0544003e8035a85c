from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_ddpm.evaluation.extraction
from hf_ddpm.evaluation.extraction import BATCH_SIZE, cached_features, extract, fingerprint
from hf_ddpm.evaluation.features import Extracted, Extractor, load_extractor
from tests.evaluation.pixels import Pixels


def process(rank=0, world=1, gather=lambda rows: rows):
    """The attributes of an `Accelerator` that distribute work."""
    return SimpleNamespace(process_index=rank, num_processes=world, is_main_process=rank == 0, gather=gather)


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


class BatchDependent(Extractor):
    """An extractor whose features contain the sum of the whole batch, so that they depend on the batch."""

    name, checksum, device = "sums", "sums", torch.device("cpu")

    def __init__(self):
        pass

    def _extract(self, pixels):
        sums = pixels.flatten(1).float().sum(dim=1, keepdim=True)
        return Extracted(torch.cat([sums, sums.sum().expand_as(sums)], dim=1))


@pytest.mark.parametrize("count", [1, BATCH_SIZE, 3 * BATCH_SIZE + 5])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_features_are_same_for_any_number_of_processes(count, world):
    # This holds even for features that depend on the batch, since the batches are the same.
    images, indices, shares = Pixels(300), range(10, 10 + count), []

    def keep(rows):
        shares.append(rows)
        return rows.repeat(world, 1)

    for rank in range(world):
        extract(BatchDependent(), images, indices, process(rank, world, keep))
    assert len({share.shape for share in shares}) == 1  # as `gather` requires
    expected = torch.cat([BatchDependent()(images[torch.tensor(batch)]).features for batch in in_batches(indices)])
    everywhere = torch.cat(shares)
    for rank in range(world):
        extracted = extract(BatchDependent(), images, indices, process(rank, world, lambda rows: everywhere))
        assert torch.equal(extracted.features, expected)


def in_batches(indices):
    return [indices[start : start + BATCH_SIZE] for start in range(0, len(indices), BATCH_SIZE)]


def test_probabilities_are_extracted_with_features(extractor):
    images = Pixels(100)
    extracted, whole = extract(extractor, images, range(100), process()), extractor(images.pixels)
    torch.testing.assert_close(extracted.features, whole.features)
    torch.testing.assert_close(extracted.probabilities, whole.probabilities)


def test_tensors_are_accepted_as_images(extractor):
    images = Pixels(70)
    extracted = extract(extractor, images.pixels, range(70), process())
    assert torch.equal(extracted.features, extract(extractor, images, range(70), process()).features)
    assert fingerprint(images.pixels, range(70)) == fingerprint(images, range(70))


def test_fingerprint_depends_on_pixels_order_and_shape():
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
    """A list with one entry per extraction."""
    calls = []
    monkeypatch.setattr(hf_ddpm.evaluation.extraction, "extract", lambda *args: (calls.append(1), extract(*args))[1])
    return calls


@pytest.fixture
def features(monkeypatch):
    """A function that returns the features of images, with the cache in a given folder."""
    digits = load_extractor("digits")

    def compute(images, cache, extractor=digits, state=None):
        monkeypatch.setattr(hf_ddpm.evaluation.extraction, "CACHE", cache)
        indices = range(len(images))
        values, name = cached_features(extractor, images, indices, state or process())
        assert name == fingerprint(images, indices)
        return values

    return compute


def test_features_of_reference_are_extracted_once(features, extractions, tmp_path):
    images = Pixels(70)
    first, again = features(images, tmp_path), features(Pixels(70), tmp_path)
    assert len(extractions) == 1 and torch.equal(first, again)
    features(Pixels(70, seed=1), tmp_path)
    features(Pixels(69), tmp_path)
    assert len(extractions) == 3 and len(list(tmp_path.iterdir())) == 3


def test_other_weights_and_recipes_have_separate_cache_files(features, extractions, tmp_path):
    images, extractor = Pixels(5), load_extractor("digits")
    features(images, tmp_path, extractor)
    extractor.recipe = "other"
    features(images, tmp_path, extractor)
    extractor.checksum = "other"
    features(images, tmp_path, extractor)
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
        lambda path: path.write_text("not a safetensors file"),
        lambda path: save_file({"other": torch.zeros(1)}, path),
        change_a_feature,
        flip_a_bit,
    ],
)
def test_damaged_cache_file_is_replaced(features, extractions, tmp_path, damage):
    images = Pixels(70)
    first = features(images, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    assert torch.equal(features(images, tmp_path), first) and len(extractions) == 2
    assert torch.equal(features(images, tmp_path), first) and len(extractions) == 2


def test_cache_file_of_another_key_is_not_used(features, extractions, tmp_path):
    features(Pixels(70), tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.unlink()
    expected = features(Pixels(70, seed=1), tmp_path)
    (other,) = tmp_path.iterdir()
    other.write_bytes(content)
    assert torch.equal(features(Pixels(70, seed=1), tmp_path), expected) and len(extractions) == 3


def test_all_processes_extract_if_one_has_no_cache(features, extractions, tmp_path):
    images = Pixels(70)
    features(images, tmp_path)
    gather = lambda rows: rows * 0 if rows.dtype == torch.int64 else rows  # noqa: E731
    features(images, tmp_path, state=process(gather=gather))
    assert len(extractions) == 2


def test_unwritable_cache_is_ignored(features, tmp_path):
    (tmp_path / "file").write_text("")
    assert features(Pixels(5), tmp_path / "file").shape == (5, 64)
