"""Open folders of image or array files as `datasets` tables, with classes by folder and metadata columns."""

import io
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import Dataset, DatasetDict, DatasetInfo, Features, Image, NamedSplit
from datasets.fingerprint import Hasher

from hf_ddpm.data.arrays import is_stack, open_stack
from hf_ddpm.data.caching import load_or_repair
from hf_ddpm.data.columns import CLASS_COLUMNS, GUESS
from hf_ddpm.data.layout import find_layout
from hf_ddpm.data.scan import Stamp, UnusedFile, image_suffixes, printable, split_by_suffix
from hf_ddpm.utils.files import one_line

METADATA_READERS: dict[str, Callable[[str], pa.Table]] = {
    "metadata.jsonl": pa.json.read_json,
    "metadata.csv": pa.csv.read_csv,
    "metadata.parquet": pa.parquet.read_table,
}


@dataclass(frozen=True)
class Opened:
    """An opened dataset.

    Attributes:
        splits: Its splits; images are not decoded yet.
        unused_files: Unused files, each with the reason; None if they are unknown, as on the Hub.
    """

    splits: Mapping[str, Dataset]
    unused_files: list[UnusedFile] | None = None


@dataclass
class _Metadata:
    """Contents of metadata files.

    Attributes:
        rows: The values of each image by column, by path relative to the folder.
        columns: The names of the columns, in order, without the image column.
        image_columns: The columns with paths of further images, such as `mask` for `mask_file_name`.
        unused_files: Listed files that are missing, and metadata files without file names.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    image_columns: set[str] = field(default_factory=set)
    unused_files: list[UnusedFile] = field(default_factory=list)


def open_folder(
    root: Path, files: Mapping[str, Stamp], unused_files: Sequence[UnusedFile], class_column: str | None
) -> Opened:
    """Open a folder of images, given by their relative paths.

    The columns are `image`, `label` if folders are classes, and the columns of metadata files. If `class_column` is a
    metadata column, images without metadata are not used.

    Raises:
        ValueError: If a metadata file cannot be read.
    """
    images, others = split_by_suffix(files, image_suffixes())
    visible, _ = split_by_suffix(files, [posixpath.splitext(name)[1] for name in METADATA_READERS])
    described = [name for name in visible if posixpath.basename(name) in METADATA_READERS]
    metadata = _read_metadata(root, described, images)
    images, unlisted = _listed(images, metadata, class_column)
    layout = find_layout(images)
    label, classes = layout.classes()
    if set(CLASS_COLUMNS) & set(metadata.columns):
        label, classes = Features(), {}
    splits = {}
    for split, names in layout.splits.items():
        columns = {"image": _paths(root, names)}
        columns |= {"label": pa.array([classes[name] for name in names], pa.int64())} if label else {}
        features = Features({"image": Image(), **label})
        for column in metadata.columns:
            columns[column], features[column] = _metadata_column(root, names, metadata, column)
        # A changed file changes the fingerprint, so it is decoded again.
        stamps = [(name, files[name].size, files[name].changed) for name in names]
        contents = [columns[column].to_pylist() for column in columns]
        fingerprint = Hasher.hash([str(root.absolute()), stamps, list(columns), contents])
        splits[split] = Dataset(pa.table(columns), info=DatasetInfo(features=features), fingerprint=fingerprint)
    others = [file for file in others if file.file not in described]
    return Opened(splits, [*unused_files, *others, *metadata.unused_files, *unlisted, *layout.unused_files])


def open_arrays(
    root: Path, files: Mapping[str, Stamp], unused_files: Sequence[UnusedFile], log: Callable[[str], object]
) -> Opened:
    """Open array files, given by their relative paths: one image per file, or all images of a file with 4 dimensions.

    The columns are `image`, and `label` if folders are classes.
    """
    layout = find_layout(list(files))
    label, classes = layout.classes()

    def rows(names: Sequence[str]) -> list[tuple[str, int, int, int | None]]:
        return [(str(root.absolute() / n), files[n].size, files[n].changed, classes.get(n)) for n in names]

    def make() -> DatasetDict:
        # The cache key is a hash of the arguments, so a changed file is read again.
        return DatasetDict({
            split: Dataset.from_generator(
                _array_rows,
                Features({"image": Image(), **label}),
                gen_kwargs={"files": rows(names)},
                split=NamedSplit(split),
            )
            for split, names in layout.splits.items()
        })  # fmt: skip

    return Opened(load_or_repair(make, log), [*unused_files, *layout.unused_files])


def _array_rows(files: Sequence[tuple[str, int, int, int | None]]) -> Iterator[dict[str, Any]]:
    """Yield the images of files, given by path, size, time and class; size and time are only part of the cache key."""
    for file, _, _, class_index in files:
        path, name = Path(file), printable(file)
        label = {} if class_index is None else {"label": class_index}
        if not is_stack(path):
            yield {"image": {"bytes": None, "path": name}, **label}
            continue
        for index, image in enumerate(open_stack(path)):
            content = io.BytesIO()
            np.save(content, image, allow_pickle=False)
            yield {"image": {"bytes": content.getvalue(), "path": f"{name}[{index}]"}, **label}


def _read_metadata(root: Path, names: Sequence[str], images: Sequence[str]) -> _Metadata:
    """Read the metadata files of a folder; a file in a subfolder overrides those above."""
    metadata, existing = _Metadata(), set(images)
    for name in sorted(names, key=lambda name: name.count("/")):
        try:
            table = METADATA_READERS[posixpath.basename(name)](str(root / name))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{str(root / name)!r}: cannot be read: {one_line(error)}") from error
        keys = {key: _column(key) for key in table.column_names if key == "file_name" or key.endswith("_file_name")}
        if not keys:
            metadata.unused_files.append(UnusedFile(name, f"{posixpath.basename(name)} without a file_name column"))
            continue
        first = "file_name" if "file_name" in keys else next(iter(keys))
        # A metadata column named image would replace the images.
        columns = {key: keys.get(key, key) for key in table.column_names if key not in (first, "image")}
        seen: dict[str, dict[str, Any]] = {}
        metadata.columns += [column for column in columns.values() if column not in metadata.columns]
        metadata.image_columns |= {keys[key] for key in columns if key in keys}
        for row in table.to_pylist():
            invalid = [key for key in keys if not isinstance(row[key], str | None)]
            if invalid:
                value = row[invalid[0]]
                raise ValueError(
                    f"{str(root / name)!r}: {invalid[0]}={value!r} is not text; expected the path of a file"
                )
            at = {key: posixpath.normpath(posixpath.join(posixpath.dirname(name), row[key] or "")) for key in keys}
            if at[first] not in existing:
                metadata.unused_files.append(
                    UnusedFile(at[first], f"missing, but listed in {posixpath.basename(name)}")
                )
                continue
            values = {
                column: (at[key] if at[key] in existing else None) if key in at else row[key]
                for key, column in columns.items()
            }
            if seen.setdefault(at[first], values) != values:
                raise ValueError(f"{str(root / name)!r}: {at[first]!r} is listed twice with different values")
            metadata.rows[at[first]] = values
    return metadata


def _column(key: str) -> str:
    return key.removesuffix("file_name").removesuffix("_") or "image"


def _listed(images: list[str], metadata: _Metadata, class_column: str | None) -> tuple[list[str], list[UnusedFile]]:
    """Return the images to use and the others: images without metadata are used unless their metadata is needed."""
    usual = set(CLASS_COLUMNS) if class_column == GUESS else {class_column}
    if not metadata.image_columns and not usual & set(metadata.columns):
        return images, []
    in_columns = {row[column] for row in metadata.rows.values() for column in metadata.image_columns}
    unlisted = [
        UnusedFile(name, "in another metadata column" if name in in_columns else "not listed in metadata")
        for name in images
        if name not in metadata.rows
    ]
    return [name for name in images if name in metadata.rows], unlisted


def _metadata_column(root: Path, names: Sequence[str], metadata: _Metadata, column: str) -> tuple[pa.Array, Any]:
    """Return a metadata column for some images, and its feature."""
    values = [metadata.rows.get(name, {}).get(column) for name in names]
    if column in metadata.image_columns:
        return _paths(root, values), Image()
    try:
        array = pa.array(values)
    except pa.ArrowException as error:
        raise ValueError(f"{str(root)!r}: metadata column {column!r} cannot be read: {one_line(error)}") from error
    return array, Features.from_arrow_schema(pa.schema({column: array.type}))[column]


def _paths(root: Path, names: Iterable[str | None]) -> pa.Array:
    """Return images as `datasets` stores them, as paths without bytes."""
    paths = pa.array([None if name is None else printable(str(root / name)) for name in names], pa.string())
    return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
