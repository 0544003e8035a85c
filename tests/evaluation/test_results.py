import json

import pytest
import torch

from hf_ddpm.evaluation.features import Extracted, load_extractor
from hf_ddpm.evaluation.frechet import Moments, frechet_distance
from hf_ddpm.evaluation.kernel import kernel_distance, squared_mmd
from hf_ddpm.evaluation.precision_recall import precision_recall
from hf_ddpm.evaluation.results import RealFeatures, Record, compute_metric, read_results


def rows(count, shift=0.0, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + shift


def real(reference, held_out=None):
    return RealFeatures(load_extractor("digits"), 40, reference, held_out)


def test_results_include_numbers_of_images_and_values_of_real_images():
    generated, reference, held_out = rows(40, 2.0), rows(90, seed=1), rows(40, seed=2)
    compared = Extracted(generated), real(reference, held_out)
    fd = compute_metric("fd", *compared)
    assert fd == {
        "value": frechet_distance(Moments.of(generated), Moments.of(reference)),
        "floor": frechet_distance(Moments.of(held_out), Moments.of(reference)),
        "num_images": 40,
        "reference_images": 90,
    }
    assert fd["floor"] < fd["value"]
    kid = compute_metric("kid", *compared)
    assert kid["value"] == squared_mmd(generated, reference) > kid["floor"] == squared_mmd(held_out, reference)
    pr = compute_metric("pr", *compared)
    assert pr["reference_images"] == 40 and pr["k"] == 3
    assert pr["precision"] < pr["held_out_precision"] and pr["recall"] < pr["held_out_recall"]
    assert "floor" not in compute_metric("fd", Extracted(generated), real(reference))


def test_precision_and_recall_use_equally_many_random_real_images():
    # The reference is sorted by class, as folders are: its first images are all of one class.
    reference = torch.cat([rows(50, 0.0), rows(50, 100.0, seed=1)])
    pr = compute_metric("pr", Extracted(torch.cat([rows(20, 0.0, 2), rows(20, 100.0, 3)])), real(reference))
    assert pr["recall"] > 0.5 and pr["precision"] > 0.5
    few = compute_metric("pr", Extracted(rows(90, seed=3)), real(reference[:50]))
    assert few["reference_images"] == 50
    assert (few["precision"], few["recall"]) == precision_recall(rows(90, seed=3), reference[:50])


def test_kernel_distance_of_many_images_uses_blocks():
    generated, reference = rows(2500, 0.1), rows(2000, seed=1)
    kid = compute_metric("kid", Extracted(generated), real(reference))
    assert (kid["value"], kid["standard_error"]) == kernel_distance(generated, reference, block_size=1000)
    assert kid["block_size"] == 1000


def test_inception_score_has_at_most_one_part_per_image():
    probabilities = torch.eye(3)[torch.arange(6) % 3]
    score = compute_metric("is", Extracted(rows(6), probabilities), real(rows(9)))
    assert (score["value"], score["splits"], score["num_images"]) == (1.0, 6, 6)  # each part has one image
    many = compute_metric("is", Extracted(rows(300), torch.eye(3)[torch.arange(300) % 3]), real(rows(9)))
    assert many["splits"] == 10 and 2.8 < many["value"] <= 3


MODEL = {"name": "m", "checksum": "abc"}


def test_results_of_same_model_are_kept_and_those_of_another_deleted(tmp_path):
    path, lines, entries = tmp_path / "new" / "results.json", [], []
    first = Record(path, MODEL, {"seed": 1}, entries.append, lines.append)
    first.add("fd", {"value": 1.0})
    first.add("nll", {"value": 2.0, "made_by": {"data": "d"}})
    nll = {"value": 2.0, "made_by": {"seed": 1, "data": "d"}}
    assert entries == [{"fd": {"value": 1.0, "made_by": {"seed": 1}}}, {"nll": nll}]
    assert first.metrics == entries[0] | entries[1]
    Record(path, {"name": "a copy", "checksum": "abc"}, log=lines.append).add("fd", {"value": 3.0})
    fd = {"value": 3.0, "made_by": {}}
    assert json.loads(path.read_text()) == {"model": {"name": "a copy", "checksum": "abc"}, "fd": fd, "nll": nll}
    assert lines == []
    Record(path, {"name": "m", "checksum": "def"}, log=lines.append).add("is", {"value": 5.0})
    assert json.loads(path.read_text()) == {
        "model": {"name": "m", "checksum": "def"},
        "is": {"value": 5.0, "made_by": {}},
    }
    assert lines == [f"{path}: replaced the results of another model"]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", [b"[]", b"half {", b"\xff\xfe"])
def test_file_that_is_not_results_file_is_not_overwritten(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: not a results file.*; move it, or choose another path$"):
        read_results(path)
    assert read_results(tmp_path / "none.json") == {}
