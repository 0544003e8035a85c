"""Classes of images: from a column of names, numbers or class labels to numbers from 0."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import Tensor

# In this order: what columns of classes are mostly called. `GUESS` asks for one of them.
USUAL_COLUMNS = ("label", "labels", "class", "classes", "fine_label", "category", "target")
GUESS = "auto"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        column: The column that holds them.
        names: Their names; the number of a class is its place here.
        numbers: The number of a class by what the column holds.
    """

    column: str
    names: tuple[str, ...]
    numbers: dict[Hashable, int]

    def encode(self, values: Sequence[Any], rows: Sequence[int]) -> Tensor:
        """Returns the numbers of classes.

        Args:
            values: What the column holds.
            rows: Their rows, for the error.

        Returns:
            The numbers, int64, shape `(N,)`, in [0, number of classes).

        Raises:
            ValueError: If a value is no class, such as none, or the -1 of images whose class is not given.
        """
        numbers = [self.numbers.get(value, -1) for value in values]
        if -1 in numbers:
            place = numbers.index(-1)
            raise ValueError(
                f"class_column={self.column!r} holds {values[place]!r} in row {rows[place]}, which is no class:"
                f" one of the {len(self.names)} classes is"
            )
        return torch.tensor(numbers, dtype=torch.int64)


def find_class_column(features: Features, name: str) -> str:
    """Returns the column that holds the classes: the one named, or with `auto` the one that looks like it.

    Args:
        features: The columns of a data set.
        name: Name of the column, or `auto`.

    Returns:
        The name of a column of class labels, integers or strings.

    Raises:
        ValueError: If there is no such column, or none that looks like it.
    """
    columns = {column: kind for column, kind in features.items() if _holds_classes(kind)}
    known = ", ".join(f"{column} ({_kind(features[column])})" for column in features)
    if name == GUESS:
        usual = [column for column in USUAL_COLUMNS if column in columns]
        if not usual:
            raise ValueError(f"no class column was recognized, name it by class_column: columns are {known}")
        return usual[0]
    if name not in columns:
        what = "holds neither class labels, integers nor strings" if name in features else "does not exist"
        raise ValueError(f"class_column={name!r} {what}: columns are {known}")
    return name


def find_classes(features: Features, column: str, values: Iterable[Any]) -> Classes:
    """Returns the classes of a column.

    Args:
        features: The columns of a data set.
        column: That of the classes.
        values: What it holds, all rows; read only if the column does not name its classes. Then they are what it holds,
            sorted: another split, or other data, may number them otherwise.

    Returns:
        The classes.
    """
    kind = features[column]
    if isinstance(kind, ClassLabel):
        return Classes(column, tuple(kind.names), {number: number for number in range(kind.num_classes)})
    found = sorted({value for value in values if value is not None})
    return Classes(column, tuple(map(str, found)), {value: number for number, value in enumerate(found)})


def read_classes(dataset: Dataset, name: str, rows: Sequence[int] | None = None) -> tuple[Classes, Tensor]:
    """Returns the classes of a data set and the class of each image.

    Args:
        dataset: An opened split, or a part of one.
        name: Name of the column, or `auto`.
        rows: Where those of a part stand in the whole, for the error.

    Returns:
        The classes; and their numbers, int64, shape `(N,)`.

    Raises:
        ValueError: If there is no such column, or a row has no class.
    """
    column = find_class_column(dataset.features, name)
    values = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    classes = find_classes(dataset.features, column, values)
    return classes, classes.encode(values, range(len(values)) if rows is None else rows)


def _holds_classes(kind: Any) -> bool:
    is_plain = isinstance(kind, Value) and (kind.dtype.startswith(("int", "uint", "string", "large_string", "bool")))
    return isinstance(kind, ClassLabel) or is_plain


def _kind(kind: Any) -> str:
    return kind.dtype if isinstance(kind, Value) else type(kind).__name__
