"""Saved datasets, archives, configurations, and tables written by other tools."""

import io
import json
import os
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from tests.data.files import load, numbered, opened, parquet, stream


def values(name, split="train", **options):
    """Return the gray values of the images of a split, sorted."""
    images = load(name, split=split, **options)
    return sorted(images[torch.arange(len(images))][:, 0, 0, 0].tolist())


def saved(grays):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [numbered(gray) for gray in grays], "label": [gray % 2 for gray in grays]}
    return Dataset.from_dict(rows, features)


def test_datasets_saved_to_disk(tmp_path):
    saved([1, 2, 3]).save_to_disk(tmp_path / "one")
    assert values(tmp_path / "one") == [1, 2, 3]
    images = load(tmp_path / "one", class_column="auto")
    assert images.class_names == ("a", "b") and images.labels.tolist() == [1, 0, 1]
    DatasetDict(train=saved([1, 2]), test=saved([3])).save_to_disk(tmp_path / "two")
    assert values(tmp_path / "two") == [1, 2] and values(tmp_path / "two", "test") == [3]
    with pytest.raises(ValueError, match="no split 'validation'; expected one of train, test"):
        values(tmp_path / "two", "validation")
    message = "--dataset_config x: a dataset saved by save_to_disk has no configurations; remove --dataset_config"
    with pytest.raises(ValueError, match=message):
        values(tmp_path / "one", dataset_config="x")
    saved([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty: a split contains no images"):
        values(tmp_path / "empty")
    # Other rows in the same folder are read again, and nothing is written to the folder.
    before = {path.name for path in (tmp_path / "one").iterdir()}
    saved([4, 5, 6]).save_to_disk(tmp_path / "one")
    assert values(tmp_path / "one") == [4, 5, 6]
    assert {path.name for path in (tmp_path / "one").iterdir()} == before


def pack(path, files):
    """Write files, given as bytes by name, to an archive."""
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def image(value, format="PNG"):
    return numbered(value, format=format)["bytes"]


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("is_file", [True, False])
def test_archives_are_read_like_folders(tmp_path, suffix, is_file):
    file = pack(
        tmp_path / f"all.{suffix}",
        {
            "./root/train/cats/0.png": image(1), "./root/train/dogs/a.b.JPG": image(200, "JPEG"),
            "./root/val/cats/0.png": image(3), "__MACOSX/root/._0.png": b"", "root/notes.md": b"x",
        },
    )  # fmt: skip
    name, lines = str(file if is_file else tmp_path), []
    images = load(name, class_column="label", log=lines.append)
    assert images.class_names == ("cats", "dogs") and images.labels.tolist() == [0, 1]
    grays = images[torch.arange(2)][:, 0, 0, 0].tolist()
    assert grays[0] == 1 and abs(grays[1] - 200) <= 2
    assert values(name, "validation") == [3]
    assert "2 images in train, 1 image in validation; unused files: " in lines[0]
    assert "hidden: 1" in lines[0] and "unknown format .md: 1" in lines[0]
    # A changed archive is read again; folders at its top are also classes.
    pack(file, {"x/0.png": image(9), "y/1.png": image(10)})
    assert values(name) == [9, 10]
    images = load(name, class_column="label")
    assert images.class_names == ("x", "y") and images.labels.tolist() == [0, 1]


def test_web_datasets_have_classes_and_splits_by_shard_name(tmp_path):
    for name, numbers in (("train-000000", [1, 2]), ("train-000001", [3]), ("val-000000", [4])):
        files = {}
        for number in numbers:
            files |= {f"{number:05d}.png": image(number), f"{number:05d}.cls": str(number % 2).encode(),
                      f"{number:05d}.json": b"{}"}  # fmt: skip
        pack(tmp_path / f"{name}.tar", files)
    assert values(tmp_path) == [1, 2, 3] and values(tmp_path, "validation") == [4]
    images = load(tmp_path, class_column="cls")
    assert images.class_names == ("0", "1") and images.labels.tolist() == [1, 0, 1]
    _, unused_files = opened(tmp_path)
    assert [file.kind for file in unused_files] == ["unknown format .json"] * 4


def test_web_datasets_may_have_text_classes_and_dots_in_names(tmp_path):
    files = {}
    for number, name in enumerate(("cat", "dog", "cat")):
        files |= {f"{number:05d}.rgb.png": image(number), f"{number:05d}.cls": name.encode()}
    pack(tmp_path / "words.tar", files)
    name = str(tmp_path / "words.tar")
    images = load(name, class_column="cls")
    assert images.class_names == ("cat", "dog") and images.labels.tolist() == [0, 1, 0]
    assert values(name) == [0, 1, 2]
    pack(tmp_path / "two.tar", {**files, "00000.depth.png": image(9)})
    with pytest.raises(
        ValueError, match=r"a sample contains several images \(00000.rgb.png and 00000.depth.png\); expected one"
    ):
        values(str(tmp_path / "two.tar"))


def test_errors_for_damaged_archives_and_members_name_them(tmp_path):
    file = pack(tmp_path / "a.zip", {"0.png": image(1), "1.png": image(2)})
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"archive '.*a\.zip': cannot be read: "):
        values(file)
    at = whole.index(b"IDAT") + 6
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"^row 0 \(.*a\.zip/0\.png\): "):
        values(file)
    assert values(file, skip_bad_images=True) == [2]
    (tmp_path / "b.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"archive '.*b\.tar': cannot be read: "):
        values(tmp_path / "b.tar")
    pack(tmp_path / "c.zip", {"a.txt": b""})
    with pytest.raises(ValueError, match=r"archive '.*c\.zip': contains no images"):
        values(tmp_path / "c.zip")


def configured(path):
    for name, numbers in (("small", [1, 2]), ("big", [3, 4, 5])):
        (path / name).mkdir(parents=True)
        parquet(path / name / "train.parquet", image=[numbered(number) for number in numbers])
    entries = "".join(f'- config_name: {name}\n  data_files: "{name}/*.parquet"\n' for name in ("small", "big"))
    (path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    return str(path)


def test_dataset_config_selects_configuration(tmp_path):
    name = configured(tmp_path / "data")
    assert values(name, dataset_config="small") == [1, 2] and values(name, dataset_config="big") == [3, 4, 5]
    several = "--dataset .*data: has several configurations; expected --dataset_config with one of small, big$"
    unknown = "--dataset .*data: no configuration 'huge'; expected --dataset_config with one of small, big$"
    options = {"seed": 0, "batch_size": 2, "resolution": 8, "channels": 1, "workers": 0}
    for config, message in ((None, several), ("huge", unknown)):
        with pytest.raises(ValueError, match=message):
            values(name, dataset_config=config)
        with pytest.raises(ValueError, match=message):
            stream(name, dataset_config=config, **options)
    source = stream(name, dataset_config="big", **options)
    assert len(source) == 3
    source.close()
    for other in ("digits", str(tmp_path / "data" / "small" / "train.parquet")):
        with pytest.raises(ValueError, match="--dataset_config x: .* has no configurations; remove --dataset_config"):
            values(other, dataset_config="x")
        with pytest.raises(ValueError, match="--dataset_config x: .* has no configurations; remove --dataset_config"):
            stream(other, dataset_config="x", **options)


def test_other_files_next_to_tables_are_counted(tmp_path):
    name, lines, report = configured(tmp_path / "data"), [], tmp_path / "report"
    (tmp_path / "data" / "figure.png").write_bytes(image(9))
    load(name, dataset_config="small", log=lines.append)
    for _ in range(2):  # a stream that resumes lists them once
        stream(
            name, dataset_config="small", seed=0, batch_size=2, workers=0, log=lines.append,
            report=report, skip_bad_images=True,
        ).close()  # fmt: skip
    assert "2 images in train" in lines[0] and len(lines) == 3
    for line in lines:
        assert ".png, only .parquet files are read: 1" in line
        assert ".parquet, not in a split of this configuration: 1" in line
    unused = [os.path.relpath(json.loads(line)["file"], name) for line in report.read_text().splitlines()]
    assert sorted(unused) == ["big/train.parquet", "figure.png"]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "more"])
def test_images_in_tables_of_other_tools_are_read(tmp_path, kind):
    files = [image(number) for number in (5, 6, 7)]
    if kind in ("struct", "more"):
        column = pa.array([{"bytes": data, "path": None} for data in files])
    else:
        column = pa.array(files, getattr(pa, kind)())
    columns = {"image": column, "label": pa.array([0, 1, 0])}
    if kind == "more":
        columns = {"digest": pa.array([b"x", b"y", b"z"]), **columns}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [5, 6, 7]
    source = stream(str(tmp_path / "a.parquet"), seed=0, batch_size=3, workers=0, class_column="label")
    batch = source.batch(0, slice(0, 3))
    source.close()
    assert sorted(batch.images[:, 0, 0, 0].tolist()) == [5, 6, 7]
    assert [(value - 5) % 2 for value in batch.images[:, 0, 0, 0].tolist()] == batch.labels.tolist()


def test_image_column_is_preferred_to_binary_column(tmp_path):
    features = Features({"scan": Image()})
    data = Dataset.from_dict({"scan": [numbered(3)]}, features).add_column("image", [b"no image"])
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert values(tmp_path / "a.parquet") == [3]
    pq.write_table(pa.table({"x": [image(1)], "y": [image(2)]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"set --image_column; the columns are x \(binary\), y \(binary\)"):
        values(tmp_path / "b.parquet")
    assert values(tmp_path / "b.parquet", image_column="y") == [2]


def test_bytes_that_are_not_images_are_rejected(tmp_path):
    pq.write_table(pa.table({"image": [image(1), b"text", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^row 1 \(.*\): not an image of a known format"):
        values(tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet", skip_bad_images=True) == [1]
