import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from hf_ddpm.data.columns import find_class_column, read_classes
from tests.data.files import load, write_images


def table(kind, values, name="label"):
    return Dataset.from_dict({name: values}, Features({name: kind}))


@pytest.mark.parametrize(
    ("kind", "values", "names", "indices"),
    [(ClassLabel(names=["cat", "ant", "bee"]), [2, 0, 2], ("cat", "ant", "bee"), [2, 0, 2]),
     (Value("int64"), [7, 3, 7, 5], ("3", "5", "7"), [2, 0, 2, 1]),
     (Value("uint8"), [1, 0], ("0", "1"), [1, 0]),
     (Value("string"), ["b", "a", "b"], ("a", "b"), [1, 0, 1])],
)  # fmt: skip
def test_class_indices_start_at_zero(kind, values, names, indices):
    classes, labels = read_classes(table(kind, values), "label", range(len(values)))
    assert classes.names == names
    assert labels.dtype == torch.int64 and labels.tolist() == indices


@pytest.mark.parametrize(
    ("kind", "values", "row"), [(ClassLabel(names=["a", "b"]), [1, 0, -1], 2), (Value("string"), ["a", None], 1)]
)
def test_error_for_image_without_class_names_its_row(kind, values, row):
    message = f"--class_column label: {values[row]!r} in row {row} is not a class; expected one of the"
    with pytest.raises(ValueError, match=message):
        read_classes(table(kind, values), "label", range(len(values)))


def test_class_columns_are_guessed_with_auto():
    features = Features({"image": Value("binary"), "score": Value("float32"), "fine_label": ClassLabel(2)})
    assert find_class_column(features, "auto") == "fine_label"
    with pytest.raises(ValueError, match="--class_column score: the column has no class labels, integers or strings"):
        find_class_column(features, "score")
    with pytest.raises(ValueError, match="--class_column label: there is no such column; the columns are image"):
        find_class_column(features, "label")
    with pytest.raises(ValueError, match="no class column recognized: set --class_column; the columns are tags"):
        find_class_column(Features({"tags": Sequence(Value("string"))}), "auto")


def test_class_folders_are_classes(tmp_path):
    for name in ("dogs", "cats"):
        write_images(tmp_path / name, count=2)
    images = load(tmp_path, channels=3, class_column="auto")
    assert images.class_names == ("cats", "dogs") and images.labels.tolist() == [0, 0, 1, 1]
    without = load(tmp_path, channels=3)
    assert without.labels is None and without.class_names == ()
