import pytest

from hf_ddpm.utils.public import hub_ids, public_values, strip_local_path


def test_existing_path_is_not_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "acme-confidential").mkdir(parents=True)
    names = [
        "data/acme-confidential",
        "uoft-cs/cifar10",
        "digits",
        "./a/b",
        "~/a",
        "/a/b",
        "a/b/c",
        "s3://b/c",
        None,
        "",
    ]
    assert hub_ids(*names) == ["uoft-cs/cifar10"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", "digits"),
        ("org/name", "org/name"),  # a known Hub id
        ("data/acme-confidential", "acme-confidential"),  # an unknown name of the form of a Hub id
        ("/home/acme/faces/", "faces"),
        ("../acme/faces", "faces"),
        ("~/acme/faces", "faces"),
        ("a/b/c", "c"),
        (r"C:\Users\acme\faces", "faces"),
        ("https://user:secret@acme.example/x/train.parquet?X-Amz-Signature=abc/def#part", "train.parquet"),
        ("https://acme.example/x%2Fy%2Ftrain.parquet%3Ftoken", "train.parquet"),
        ("s3://acme-private/faces/*.parquet", "*.parquet"),
        ("s3://acme-private", "s3"),
        ("gs://acme-private/", "gs"),
        ("hf://datasets/acme/private/data/train.parquet", "train.parquet"),
        ("file:///home/acme/faces", "faces"),
        ("simplecache::https://user:secret@acme.example/faces.parquet?sig=1", "faces.parquet"),
        ("zip://inner.parquet::s3://acme-private/faces.zip", "faces.zip"),
        ("https://[acme/faces", "https"),
        ("https://acme.example/x;jsessionid=SECRET", "x"),
        ("hf://datasets/acme/private@main", "private"),
        ("bob@host.example:data/faces", "faces"),
        ("bob@host.example:faces", "faces"),
        (".", "."),
        ("/", "/"),
    ],
)
def test_only_last_part_of_path_or_url_is_public(name, expected):
    assert strip_local_path(name, ["org/name"]) == expected


def test_values_are_made_public_at_any_depth():
    kept = {"dataset": "org/name", "hub_model_id": "me/model", "resolution": [32, 32], "device": "A 1/2 GPU"}
    kept["sampling"] = {"class_labels": ["n/a"], "eta": 0.5, "classes": None}
    options = {**kept, "init_from": "runs/acme", "made_by": {"samples": "/home/acme/out"}, "weights": ["a/b", None]}
    public = {**kept, "init_from": "acme", "made_by": {"samples": "out"}, "weights": ["b", None]}
    assert public_values(options, ["org/name"]) == public
