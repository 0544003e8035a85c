"""Columns of data sets that hold images, and those that hold classes, as numbers from 0."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch import Tensor

# What columns are mostly called, the likeliest name first.
IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "picture")
CLASS_COLUMNS = ("label", "labels", "class", "classes", "fine_label", "category", "target")
# The name that asks for one of `CLASS_COLUMNS`.
GUESS = "auto"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        column: The column that holds them.
        names: Their names, by number.
        numbers: Their numbers, by value of the column.
    """

    column: str
    names: tuple[str, ...]
    numbers: dict[Hashable, int]

    def encode(self, values: Sequence[Any], rows: Sequence[int]) -> Tensor:
        """Returns the numbers of classes, int64, shape `(N,)`.

        Raises:
            ValueError: If a value is no class, such as None, or the -1 of images whose class is not given; its row is
                named.
        """
        numbers = [self.numbers.get(value, -1) for value in values]
        if -1 in numbers:
            place = numbers.index(-1)
            raise ValueError(
                f"class_column={self.column!r} holds {values[place]!r} in row {rows[place]}, which is no class:"
                f" one of the {len(self.names)} classes is"
            )
        return torch.tensor(numbers, dtype=torch.int64)


def find_image_column(features: Features, name: str | None = None) -> str:
    """Returns the column of the images, or of files as bytes, as other tools write them; guessed without a name.

    Raises:
        ValueError: If there is no such column, or none that looks like it, or more than one.
    """
    encoded = [column for column, kind in features.items() if _holds_files(kind)]
    if name is not None:
        if name not in encoded:
            what = "holds no images" if name in features else "does not exist"
            raise ValueError(f"image_column={name!r} {what}: columns are {_described(features)}")
        return name
    images = [column for column in encoded if isinstance(features[column], Image)] or encoded
    usual = [column for column in IMAGE_COLUMNS if column in images]
    if not usual and len(images) != 1:
        raise ValueError(f"no image column was recognized, name it by image_column: columns are {_described(features)}")
    return (usual or images)[0]


def find_class_column(features: Features, name: str) -> str:
    """Returns the column of the classes, as class labels, integers or strings; guessed if the name is `auto`.

    Raises:
        ValueError: If there is no such column, or none that looks like it.
    """
    columns = [column for column, kind in features.items() if _holds_classes(kind)]
    if name == GUESS:
        usual = [column for column in CLASS_COLUMNS if column in columns]
        if not usual:
            known = _described(features)
            raise ValueError(f"no class column was recognized, name it by class_column: columns are {known}")
        return usual[0]
    if name not in columns:
        what = "holds neither class labels, integers nor strings" if name in features else "does not exist"
        raise ValueError(f"class_column={name!r} {what}: columns are {_described(features)}")
    return name


def find_classes(features: Features, column: str, values: Iterable[Any]) -> Classes:
    """Returns the classes of a column: those that it names, else its values, sorted.

    Values are read only in the second case; then another split, or other data, may number classes differently.
    """
    kind = features[column]
    if isinstance(kind, ClassLabel):
        return Classes(column, tuple(kind.names), {number: number for number in range(kind.num_classes)})
    found = sorted({value for value in values if value is not None})
    return Classes(column, tuple(map(str, found)), {value: number for number, value in enumerate(found)})


def read_classes(dataset: Dataset, name: str, rows: Sequence[int]) -> tuple[Classes, Tensor]:
    """Returns the classes of some rows of a split, and the class of each row, int64, shape `(N,)`.

    Raises:
        ValueError: If there is no such column, or a row has no class.
    """
    column = find_class_column(dataset.features, name)
    values = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    classes = find_classes(dataset.features, column, values)
    return classes, classes.encode(values, rows)


def _holds_files(kind: Any) -> bool:
    """Returns whether a column is one of images, or of their files: bytes alone, or beside a path."""
    if isinstance(kind, Value):
        return kind.dtype in ("binary", "large_binary")
    return isinstance(kind, Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _holds_classes(kind: Any) -> bool:
    is_plain = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "string", "large_string", "bool"))
    return isinstance(kind, ClassLabel) or is_plain


def _described(features: Features) -> str:
    kinds = {name: kind.dtype if isinstance(kind, Value) else type(kind).__name__ for name, kind in features.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
