"""Folders of images as tables of `datasets`: paths, classes by folder, and the columns of metadata files."""

import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image
from datasets.fingerprint import Hasher

from hf_ddpm.data.labels import GUESS, USUAL_COLUMNS
from hf_ddpm.data.layout import Layout, arrange, class_names
from hf_ddpm.data.scan import LeftOut, Stamp, image_suffixes, printable, printable_name, sort_out
from hf_ddpm.utils.files import one_line

READERS: dict[str, Callable[[str], pa.Table]] = {
    "metadata.jsonl": pa.json.read_json,
    "metadata.csv": pa.csv.read_csv,
    "metadata.parquet": pa.parquet.read_table,
}


@dataclass(frozen=True)
class Opened:
    """An opened data set.

    Attributes:
        splits: Its splits, as `datasets` reads them; images are not decoded yet.
        left_out: Files that are not used, each with its reason; None if they are not known, as on the Hub.
    """

    splits: Mapping[str, Dataset]
    left_out: list[LeftOut] | None = None


@dataclass
class Metadata:
    """What metadata files say about images.

    Attributes:
        rows: The columns of each image, by its path relative to the folder; paths of other images are columns, too.
        columns: Their names, in order, without that of the image.
        pictures: Those of them that hold paths of images, such as `mask` for `mask_file_name`.
        left_out: Files that it names and that are not there, and metadata files without names of files.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    pictures: set[str] = field(default_factory=set)
    left_out: list[LeftOut] = field(default_factory=list)


def open_folder(
    root: Path, files: Mapping[str, Stamp], left_out: Sequence[LeftOut], class_column: str | None
) -> Opened:
    """Opens a folder of images.

    Args:
        root: The folder.
        files: The files below it, by their relative path.
        left_out: What cannot be read there.
        class_column: Column of the classes, if classes are wanted: images without metadata are then left out if it is
            one of metadata.

    Returns:
        The splits: `image`, `label` where folders are classes, and the columns of metadata files.

    Raises:
        ValueError: If a metadata file cannot be read.
    """
    images, others = sort_out(files, image_suffixes())
    visible, _ = sort_out(files, [posixpath.splitext(name)[1] for name in READERS])
    described = [name for name in visible if posixpath.basename(name) in READERS]
    metadata = read_metadata(root, described, images)
    images, unlisted = _listed(images, metadata, class_column)
    layout = arrange(images)
    others = [file for file in others if file.file not in described]
    labels = class_names(layout.folders(name) for names in layout.splits.values() for name in names)
    if set(USUAL_COLUMNS) & set(metadata.columns):
        labels = None
    splits = {
        split: _table(root, {name: files[name] for name in names}, layout, labels, metadata)
        for split, names in layout.splits.items()
    }
    return Opened(splits, [*left_out, *others, *metadata.left_out, *unlisted, *layout.left_out])


def read_metadata(root: Path, names: Sequence[str], images: Sequence[str]) -> Metadata:
    """Reads the metadata files of a folder; what one of them says of a file in its own folder goes before others.

    Args:
        root: The folder.
        names: Their paths, relative to the folder.
        images: Those of its images.

    Raises:
        ValueError: If one cannot be read; it is named.
    """
    metadata, known = Metadata(), set(images)
    for name in sorted(names, key=lambda name: name.count("/")):
        try:
            table = READERS[posixpath.basename(name)](str(root / name))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{str(root / name)!r} cannot be read: {one_line(error)}") from error
        keys = {key: _column(key) for key in table.column_names if key == "file_name" or key.endswith("_file_name")}
        if not keys:
            metadata.left_out.append(LeftOut(name, f"{posixpath.basename(name)} without a column file_name"))
            continue
        first = "file_name" if "file_name" in keys else next(iter(keys))
        # A column called image would take the place of the images.
        columns = {key: keys.get(key, key) for key in table.column_names if key not in (first, "image")}
        seen: dict[str, dict[str, Any]] = {}
        metadata.columns += [column for column in columns.values() if column not in metadata.columns]
        metadata.pictures |= {keys[key] for key in columns if key in keys}
        for row in table.to_pylist():
            odd = [key for key in keys if not isinstance(row[key], str | None)]
            if odd:
                raise ValueError(f"{str(root / name)!r}: {odd[0]}={row[odd[0]]!r}: expected the path of a file")
            at = {key: posixpath.normpath(posixpath.join(posixpath.dirname(name), row[key] or "")) for key in keys}
            if at[first] not in known:
                metadata.left_out.append(LeftOut(at[first], f"missing, but listed in {posixpath.basename(name)}"))
                continue
            values = {
                column: (at[key] if at[key] in known else None) if key in at else row[key]
                for key, column in columns.items()
            }
            if seen.setdefault(at[first], values) != values:
                raise ValueError(f"{str(root / name)!r} lists {at[first]!r} twice with different values")
            metadata.rows[at[first]] = values
    return metadata


def _column(key: str) -> str:
    return key.removesuffix("file_name").removesuffix("_") or "image"


def _listed(images: list[str], metadata: Metadata, class_column: str | None) -> tuple[list[str], list[LeftOut]]:
    """Returns the images to use: those without metadata, too, unless something of theirs is needed."""
    usual = set(USUAL_COLUMNS) if class_column == GUESS else {class_column}
    if not metadata.pictures and not usual & set(metadata.columns):
        return images, []
    of_others = {row[column] for row in metadata.rows.values() for column in metadata.pictures}
    unlisted = [
        LeftOut(name, "in another column of metadata" if name in of_others else "not listed in metadata")
        for name in images
        if name not in metadata.rows
    ]
    return [name for name in images if name in metadata.rows], unlisted


def _table(
    root: Path, files: Mapping[str, Stamp], layout: Layout, labels: list[str] | None, metadata: Metadata
) -> Dataset:
    """Returns the rows of a split; its fingerprint is that of its files, so that a changed one is decoded anew."""
    columns: dict[str, pa.Array] = {"image": _paths(root, files)}
    features = Features({"image": Image()})
    if labels is not None:
        numbers = {name: number for number, name in enumerate(labels)}
        features["label"] = ClassLabel(names=[printable_name(name) for name in labels])
        columns["label"] = pa.array([numbers[layout.folders(name)[-1]] for name in files], pa.int64())
    for column in metadata.columns:
        try:
            values = [metadata.rows.get(name, {}).get(column) for name in files]
            is_picture = column in metadata.pictures
            columns[column] = _paths(root, values) if is_picture else pa.array(values)
        except pa.ArrowException as error:
            raise ValueError(f"column {column!r} of metadata in {str(root)!r}: {one_line(error)}") from error
        named = pa.schema({column: columns[column].type})
        features |= {column: Image()} if is_picture else Features.from_arrow_schema(named)
    stamps = [(name, stamp.size, stamp.changed) for name, stamp in files.items()]
    fingerprint = Hasher.hash([str(root.absolute()), stamps, list(columns), [columns[c].to_pylist() for c in columns]])
    return Dataset(pa.table(columns), info=DatasetInfo(features=features), fingerprint=fingerprint)


def _paths(root: Path, names: Iterable[str | None]) -> pa.Array:
    """Returns images as `datasets` keeps them, without their bytes."""
    paths = pa.array([None if name is None else printable(str(root / name)) for name in names], pa.string())
    return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
