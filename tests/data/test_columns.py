import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from hf_ddpm.data.columns import find_class_column, read_classes
from tests.data.files import load, write_images


def table(kind, values, name="label"):
    return Dataset.from_dict({name: values}, Features({name: kind}))


@pytest.mark.parametrize(
    ("kind", "values", "names", "numbers"),
    [(ClassLabel(names=["cat", "ant", "bee"]), [2, 0, 2], ("cat", "ant", "bee"), [2, 0, 2]),
     (Value("int64"), [7, 3, 7, 5], ("3", "5", "7"), [2, 0, 2, 1]),
     (Value("uint8"), [1, 0], ("0", "1"), [1, 0]),
     (Value("string"), ["b", "a", "b"], ("a", "b"), [1, 0, 1])],
)  # fmt: skip
def test_classes_are_numbered_from_zero(kind, values, names, numbers):
    classes, labels = read_classes(table(kind, values), "label", range(len(values)))
    assert classes.names == names
    assert labels.dtype == torch.int64 and labels.tolist() == numbers


@pytest.mark.parametrize(
    ("kind", "values", "row"), [(ClassLabel(names=["a", "b"]), [1, 0, -1], 2), (Value("string"), ["a", None], 1)]
)
def test_an_image_without_a_class_is_named_by_its_row(kind, values, row):
    with pytest.raises(ValueError, match=f"class_column='label' holds {values[row]!r} in row {row}, which is no class"):
        read_classes(table(kind, values), "label", range(len(values)))


def test_class_columns_are_guessed_when_asked():
    features = Features({"image": Value("binary"), "score": Value("float32"), "fine_label": ClassLabel(2)})
    assert find_class_column(features, "auto") == "fine_label"
    with pytest.raises(ValueError, match="class_column='score' holds neither class labels, integers nor strings"):
        find_class_column(features, "score")
    with pytest.raises(ValueError, match="class_column='label' does not exist: columns are image"):
        find_class_column(features, "label")
    with pytest.raises(ValueError, match="no class column was recognized, name it by class_column: columns are tags"):
        find_class_column(Features({"tags": Sequence(Value("string"))}), "auto")


def test_class_folders_are_classes(tmp_path):
    for name in ("dogs", "cats"):
        write_images(tmp_path / name, count=2)
    images = load(tmp_path, channels=3, class_column="auto")
    assert images.class_names == ("cats", "dogs") and images.labels.tolist() == [0, 0, 1, 1]
    without = load(tmp_path, channels=3)
    assert without.labels is None and without.class_names == ()
