"""Image folders: each file is used, or counted with the reason."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from hf_ddpm.data.layout import find_layout
from tests.data.files import load, write_images
from tests.data.files import opened as open_data


def gray(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("L", (8, 8), value).save(path)


def opened(folder, split="train", **options):
    """Return the gray values of the images of a split, the unused files with their reasons, and the log line."""
    lines = []
    images = load(folder, split=split, log=lines.append, **options)
    _, unused_files = open_data(folder, split=split, class_column=options.get("class_column"))
    values = images[torch.arange(len(images))][:, 0, 0, 0].tolist()
    return values, {(os.path.relpath(file.file, folder), file.kind) for file in unused_files}, lines[0]


def test_links_are_followed_except_in_cycles(tmp_path):
    write_images(tmp_path / "pool", count=3)
    data = tmp_path / "data"
    gray(data / "own" / "a.png", 7)
    (data / "cats").symlink_to(tmp_path / "pool")
    (data / "dogs").symlink_to("../pool")
    (data / "file.png").symlink_to(tmp_path / "pool" / "0.png")
    (data / "own" / "back").symlink_to(data)
    (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (data / "self.png").symlink_to(data / "self.png")
    values, unused_files, line = opened(data)
    assert len(values) == 1 + 3 + 3 + 1
    assert unused_files == {
        ("own/back", "link to a parent folder"),
        ("gone.png", "broken link"),
        ("self.png", "broken link"),
    }
    assert "8 images in train; unused files: broken link: 2, link to a parent folder: 1" in line


def test_unused_files_are_counted_by_reason_and_reported(tmp_path):
    data = tmp_path / "data"
    gray(data / "0.PNG", 1)
    gray(data / "1.webp", 2)
    gray(data / ".hidden.png", 3)
    gray(data / "__MACOSX" / "2.png", 4)
    gray(data / ".git" / "3.png", 5)
    for number in range(7):
        (data / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (data / "labels.txt").write_text("1")
    (data / "README").write_text("1")
    os.mkfifo(data / "pipe.png")
    report = tmp_path / "bad_images.jsonl"
    values, unused_files, line = opened(data, skip_bad_images=True, report=report)
    assert values == [1, 2]
    expected = {
        "hidden": 2, "in __MACOSX/": 1, "unknown format .heic": 7, "unknown format .txt": 1, "no suffix": 1,
        "not a regular file or folder": 1,
    }  # fmt: skip
    kinds = [kind for _, kind in unused_files]
    assert {kind: kinds.count(kind) for kind in kinds} == expected
    assert "2 images in train" in line and ".heic: 7 (install pillow-heif)" in line and "\n" not in line
    assert all(f"{kind}: {count}" in line for kind, count in expected.items())
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(lines) == 13 and all(line["row"] is None for line in lines)
    assert "unknown format .heic (install pillow-heif)" in {line["reason"] for line in lines}


def test_formats_that_pillow_decodes_are_images(tmp_path):
    suffixes = [s for s in (".png", ".jpg", ".jfif", ".bmp", ".avif", ".jp2", ".tga", ".ppm", ".qoi")
                if s in PILImage.registered_extensions()]  # fmt: skip
    for suffix in suffixes:
        PILImage.new("RGB", (8, 8), (200, 200, 200)).save(tmp_path / f"a{suffix}")
    (tmp_path / "features.h5").write_bytes(b"\x89HDF\r\n\x1a\n")  # recognized by Pillow but not decoded
    values, unused_files, _ = opened(tmp_path)
    assert len(values) == len(suffixes) and np.abs(np.array(values) - 200).max() <= 2
    assert unused_files == {("features.h5", "unknown format .h5")}


LAYOUTS = [
    # folders, number of images per split, number of unused images
    (["train/", "validation/"], {"train": 1, "validation": 1}, 0),
    (["train/a/", "train/b/", "validation/a/", "test/b/"], {"train": 2, "validation": 1, "test": 1}, 0),
    (["validation/"], {"validation": 1}, 0),
    (["test/a/"], {"test": 1}, 0),
    (["train/", "val/"], {"train": 1, "validation": 1}, 0),
    (["Train/", "Valid/"], {"train": 1, "validation": 1}, 0),
    (["training/0/", "testing/0/"], {"train": 1, "test": 1}, 0),
    (["train2017/", "val2017/", "test2017/"], {"train": 1, "validation": 1, "test": 1}, 0),
    (["train/", "dev/", "extra/", ""], {"train": 1, "validation": 1}, 2),
    (["images/train/", "images/val/"], {"train": 1, "validation": 1}, 0),
    (["cats/train/", "cats/test/", "dogs/train/", "dogs/test/"], {"train": 2, "test": 2}, 0),
    (["train/", ""], {"train": 1}, 1),
    (["train/a/", "train/b/", "preview/"], {"train": 2}, 1),
    (["train/", "bus/", "bicycle/"], {"train": 3}, 0),
    (["test/", "cats/", "dogs/"], {"test": 1}, 2),
    (["validation/", "cats/"], {"validation": 1}, 1),
    (["testing/", "training_set/", "other/"], {"train": 3}, 0),
    (["cats/", "dogs/"], {"train": 2}, 0),
    ([""], {"train": 1}, 0),
]


@pytest.mark.parametrize(
    ("folders", "splits", "unused_files"), LAYOUTS, ids=[" ".join(row[0]) or "." for row in LAYOUTS]
)
def test_split_folders_are_splits_and_held_out_images_are_not_used_for_training(folders, splits, unused_files):
    layout = find_layout([f"{folder}{number}.png" for number, folder in enumerate(folders)])
    assert {split: len(names) for split, names in layout.splits.items()} == splits
    assert len(layout.unused_files) == unused_files
    held_out = {"validation", "valid", "val", "dev", "test"} & {f.casefold().strip("/") for f in folders}
    assert not any(name.split("/")[0].casefold() in held_out for name in layout.splits.get("train", []))


def test_validation_images_are_not_in_training_split(tmp_path):
    gray(tmp_path / "both" / "train" / "0.png", 1)
    gray(tmp_path / "both" / "validation" / "1.png", 2)
    assert opened(tmp_path / "both")[0] == [1]
    assert opened(tmp_path / "both", "validation")[0] == [2]
    gray(tmp_path / "alone" / "validation" / "1.png", 2)
    with pytest.raises(ValueError, match="no split 'train'; expected one of validation"):
        opened(tmp_path / "alone")
    gray(tmp_path / "alone" / "cats" / "0.png", 1)
    message = r"no split 'train'; expected one of validation .*in cats/, outside the split folders validation/"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "alone")


def test_train_folder_next_to_class_folders_is_treated_as_class(tmp_path):
    for number, name in enumerate(("bicycle", "bus", "train")):
        gray(tmp_path / name / "a.png", number)
    images = load(tmp_path, class_column="label")
    assert images.class_names == ("bicycle", "bus", "train") and images.labels.tolist() == [0, 1, 2]


def test_classes_are_same_in_all_splits_and_split_folders_are_not_classes(tmp_path):
    for name in ("train/dog", "train/cat", "val/cat", "val/ant"):
        gray(tmp_path / name / "a.png", 1)
    for split, labels in (("train", [1, 2]), ("validation", [0, 1])):
        images = load(tmp_path, split=split, class_column="label")
        assert images.class_names == ("ant", "cat", "dog") and images.labels.tolist() == labels
    for name in ("train", "test"):
        gray(tmp_path / "flat" / name / "a.png", 1)
    with pytest.raises(ValueError, match="--class_column label: there is no such column"):
        load(tmp_path / "flat", class_column="label")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_images_without_metadata_are_used_unless_metadata_has_classes(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number in range(4):
        gray(tmp_path / "sub" / f"{number}.png", number)
    rows = {"file_name": ["sub/2.png", "sub/0.png", "sub/9.png"], "category": ["x", "y", "x"]}
    file = tmp_path / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(rows), file)
    else:
        pairs = list(zip(*rows.values(), strict=True))
        text = [json.dumps(dict(zip(rows, pair, strict=True))) for pair in pairs]
        file.write_text("\n".join(text if kind == "jsonl" else [",".join(pair) for pair in [tuple(rows), *pairs]]))
    values, unused_files, line = opened(tmp_path)
    assert values == [0, 1, 2, 3]
    assert unused_files == {("sub/9.png", f"missing, but listed in metadata.{kind}")}
    for column in ("category", "auto"):
        values, unused_files, line = opened(tmp_path, class_column=column)
        images = load(tmp_path, class_column=column)
        assert values == [0, 2] and [images.class_names[label] for label in images.labels] == ["y", "x"]
        assert {("sub/1.png", "not listed in metadata"), ("sub/3.png", "not listed in metadata")} < unused_files
        assert "not listed in metadata: 2" in line


def test_images_of_other_metadata_columns_are_not_rows(tmp_path):
    for number, name in enumerate(("image", "mask", "loose")):
        gray(tmp_path / f"{name}.png", number)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "image.png", "mask_file_name": "mask.png"}\n')
    values, unused_files, _ = opened(tmp_path)
    assert values == [0]
    assert unused_files == {("mask.png", "in another metadata column"), ("loose.png", "not listed in metadata")}
    assert opened(tmp_path, image_column="mask")[0] == [1]


def test_classes_of_metadata_override_those_of_folders(tmp_path):
    for number, folder in enumerate("ab"):
        gray(tmp_path / folder / "0.png", number)
    (tmp_path / "metadata.csv").write_text("file_name,category\na/0.png,y\nb/0.png,x\n")
    images = load(tmp_path, class_column="auto")
    assert images.class_names == ("x", "y") and images.labels.tolist() == [1, 0]


def test_unusable_metadata_files_are_reported(tmp_path):
    gray(tmp_path / "a.png", 1)
    (tmp_path / "metadata.jsonl").write_text('{"text": "x"}\n')
    assert opened(tmp_path)[1] == {("metadata.jsonl", "metadata.jsonl without a file_name column")}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": ')
    with pytest.raises(ValueError, match=r"metadata\.jsonl': cannot be read: ") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_file_names_that_are_not_utf_8_are_supported(tmp_path):
    for folder, file, value in ((b"caf\xe9", b"\xff.png", 3), (b"tea", b"a b%.png", 4)):
        os.makedirs(os.fsencode(tmp_path) + b"/" + folder)
        gray(tmp_path / os.fsdecode(folder) / os.fsdecode(file), value)
    with open(os.fsencode(tmp_path) + b"/caf\xe9/\xfe.png", "wb") as bad:
        bad.write(b"no image")
    with pytest.raises(ValueError, match=r"^row 0 \(file:///.*caf%E9/%FE\.png\): "):
        opened(tmp_path)
    report = tmp_path / "report"
    values, _, _ = opened(tmp_path, skip_bad_images=True, report=report, class_column="label")
    assert values == [3, 4]
    assert json.loads(report.read_text().splitlines()[0])["file"].endswith("caf%E9/%FE.png")
    images = load(tmp_path, skip_bad_images=True, class_column="label")
    assert images.class_names == ("caf\\xe9", "tea")


def test_error_for_folder_without_images_lists_its_files(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"contains no images \(unused files: unknown format \.heic: 2 \(install"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"file_name": 5}], "metadata.jsonl': file_name=5 is not text; expected the path of a file"),
        (
            [{"file_name": "0.png", "c": "a"}, {"file_name": "0.png", "c": "b"}],
            "metadata.jsonl': '0.png' is listed twice with different values",
        ),
    ],
)
def test_invalid_metadata_is_rejected(tmp_path, lines, message):
    write_images(tmp_path, count=2)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_metadata_files_with_different_types_of_column_are_rejected(tmp_path):
    for name, value in (("a", 1), ("b", "x")):
        write_images(tmp_path / name, count=1)
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "size": value}))
    with pytest.raises(ValueError, match="'.*': metadata column 'size' cannot be read: "):
        opened(tmp_path)


def test_metadata_column_named_image_is_ignored(tmp_path):
    write_images(tmp_path, count=2)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "image": "x"}))
    assert len(opened(tmp_path)[0]) == 2


def test_split_folders_may_be_in_different_folders():
    layout = find_layout(["2020/train/0.png", "2021/val/1.png"])
    assert layout.splits == {"train": ["2020/train/0.png"], "validation": ["2021/val/1.png"]}


def test_images_with_unread_frames_are_counted(tmp_path):
    frames = [PILImage.new("L", (8, 8), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    lines = []
    load(tmp_path, log=lines.append)
    assert any("only the first frame or page is read" in line for line in lines)
