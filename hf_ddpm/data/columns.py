"""Find the image column and the class column of a dataset; encode classes as indices."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch import Tensor

# Usual names of columns, the most likely first.
IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "picture")
CLASS_COLUMNS = ("label", "labels", "class", "classes", "fine_label", "category", "target")
# Value of `--class_column` to guess one of `CLASS_COLUMNS`.
GUESS = "auto"


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset.

    Attributes:
        column: The class column.
        names: Class names, by index.
        indices: Class indices, by value of the column.
    """

    column: str
    names: tuple[str, ...]
    indices: dict[Hashable, int]

    def encode(self, values: Sequence[Any], rows: Sequence[int]) -> Tensor:
        """Return the class indices of values, int64, shape `(N,)`.

        Args:
            values: Values of the class column.
            rows: Their row numbers, for the error message.

        Raises:
            ValueError: If a value is not a class, such as None or -1 for unlabeled images; the message names the row.
        """
        indices = [self.indices.get(value, -1) for value in values]
        if -1 in indices:
            first = indices.index(-1)
            raise ValueError(
                f"--class_column {self.column}: {values[first]!r} in row {rows[first]} is not a class; "
                f"expected one of the {len(self.names)} classes"
            )
        return torch.tensor(indices, dtype=torch.int64)


def find_image_column(features: Features, name: str | None = None) -> str:
    """Return the name of the image column, which may also hold image files as bytes; guessed if no name is given.

    Raises:
        ValueError: If the column does not exist or has no images, or if none or several columns look like it.
    """
    encoded = [column for column, kind in features.items() if _has_files(kind)]
    if name is not None:
        if name not in encoded:
            reason = "the column has no images" if name in features else "there is no such column"
            raise ValueError(f"--image_column {name}: {reason}; the columns are {_described(features)}")
        return name
    images = [column for column in encoded if isinstance(features[column], Image)] or encoded
    usual = [column for column in IMAGE_COLUMNS if column in images]
    if not usual and len(images) != 1:
        columns = _described(features)
        raise ValueError(f"no image column recognized: set --image_column; the columns are {columns}")
    return (usual or images)[0]


def find_class_column(features: Features, name: str) -> str:
    """Return the name of the class column, of class labels, integers or strings; guessed if `name` is `auto`.

    Raises:
        ValueError: If the column does not exist or has no classes, or if no column looks like it.
    """
    columns = [column for column, kind in features.items() if _has_classes(kind)]
    if name == GUESS:
        usual = [column for column in CLASS_COLUMNS if column in columns]
        if not usual:
            listed = _described(features)
            raise ValueError(f"no class column recognized: set --class_column; the columns are {listed}")
        return usual[0]
    if name not in columns:
        exists = name in features
        reason = "the column has no class labels, integers or strings" if exists else "there is no such column"
        raise ValueError(f"--class_column {name}: {reason}; the columns are {_described(features)}")
    return name


def find_classes(features: Features, column: str, values: Iterable[Any]) -> Classes:
    """Return the classes of a column: its class names if it is a `ClassLabel`, otherwise its sorted values.

    Only the second case reads `values`. The indices may then differ for another split or other data.
    """
    kind = features[column]
    if isinstance(kind, ClassLabel):
        return Classes(column, tuple(kind.names), {index: index for index in range(kind.num_classes)})
    distinct = sorted({value for value in values if value is not None})
    return Classes(column, tuple(map(str, distinct)), {value: index for index, value in enumerate(distinct)})


def read_classes(dataset: Dataset, name: str, rows: Sequence[int]) -> tuple[Classes, Tensor]:
    """Return the classes of a dataset and the class index of each row, int64, shape `(N,)`.

    Raises:
        ValueError: If the class column does not exist, or a row has no class.
    """
    column = find_class_column(dataset.features, name)
    values = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    classes = find_classes(dataset.features, column, values)
    return classes, classes.encode(values, rows)


def _has_files(kind: Any) -> bool:
    """Return whether a column has images, or image files as bytes with or without a path."""
    if isinstance(kind, Value):
        return kind.dtype in ("binary", "large_binary")
    return isinstance(kind, Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _has_classes(kind: Any) -> bool:
    is_plain = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "string", "large_string", "bool"))
    return isinstance(kind, ClassLabel) or is_plain


def _described(features: Features) -> str:
    kinds = {name: kind.dtype if isinstance(kind, Value) else type(kind).__name__ for name, kind in features.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
