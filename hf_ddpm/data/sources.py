"""Data sets by name: the embedded digits, a folder, a file, or an id on the Hub; all end as `datasets.Dataset`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, Value

from hf_ddpm.data.loading import Log, files_beside, find_data_files, open_splits
from hf_ddpm.data.scan import LeftOut, summary
from hf_ddpm.utils.seeds import SUBSET, generator

# In this order: what image columns are mostly called.
USUAL_COLUMNS = ("image", "img", "images", "pixel_values", "picture")


def open_dataset(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Opens a split of a data set; see `open_split`."""
    return open_split(name, split, config=config)[0]


def open_split(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    class_column: str | None = None,
    log: Log = lambda line: None,
) -> tuple[Dataset, list[LeftOut]]:
    """Opens a split of a data set.

    Args:
        name: `digits` (embedded); a folder of images, arrays (`.npy`, `.npz`), archives or parquet files, or one that
            `datasets` has saved; a parquet or array file, or an archive; or an id on the Hub.
        split: Name of the split.
        config: Configuration, for data sets with several ones.
        class_column: Column of the classes, if they are wanted.
        log: Called with a line on a folder's files, and with one for each damaged cache.

    Returns:
        The split, as `datasets` reads it, whose images are not decoded yet; and the files that are not used.

    Raises:
        ValueError: If there is no such data set, configuration or split, or no image in it.
        OSError: If the disk of the cache is full.
    """
    opened = open_splits(name, config, class_column, log)
    left_out = opened.left_out or []
    if opened.left_out is not None:
        log(summary(name, {split: len(data) for split, data in opened.splits.items()}, left_out))
    if split not in opened.splits:
        beside = [file.kind for file in left_out if "beside the folders of splits" in file.kind]
        hint = f" (images are {beside[0]})" if beside else ""
        raise ValueError(f"dataset {name!r} has no split {split!r}: one of {', '.join(opened.splits)}{hint}")
    if len(opened.splits[split]) == 0:
        raise ValueError(f"dataset {name!r} is empty: split {split!r} holds no image")
    return opened.splits[split], left_out


def find_image_column(dataset: Dataset, name: str | None = None) -> str:
    """Returns the column that holds the images: the one named, or the one that looks like it.

    Args:
        dataset: An opened split.
        name: Name of the column; guessed if None.

    Returns:
        The name of a column of images, or of files as bytes, as other tools write them.

    Raises:
        ValueError: If there is no such column, or none that looks like it, or more than one.
    """
    columns = dataset.column_names
    encoded = [column for column in columns if _holds_files(dataset.features[column])]
    declared = [column for column in encoded if isinstance(dataset.features[column], Image)]
    images = encoded if name is not None else declared or encoded
    if name is not None:
        if name not in images:
            what = "holds no images" if name in columns else "does not exist"
            raise ValueError(f"image_column={name!r} {what}: columns are {_described(dataset)}")
        return name
    usual = [column for column in USUAL_COLUMNS if column in images]
    if not usual and len(images) != 1:
        raise ValueError(f"no image column was recognized, name it by image_column: columns are {_described(dataset)}")
    return (usual or images)[0]


def find_shards(
    name: str, split: str = "train", config: str | None = None, log: Log = lambda line: None
) -> tuple[list[str], list[LeftOut]]:
    """Finds the parquet files of a split, without reading or fetching them.

    Args:
        name: `digits`, a folder of parquet files, a parquet file, an id on the Hub, or a URL or pattern of parquet
            files that `fsspec` knows how to open (`https://`, `hf://`, `s3://`).
        split: Name of the split; a single file and a URL are taken for the one asked for.
        config: Configuration, for data sets with several ones.
        log: Called with a line on a folder's files.

    Returns:
        Paths and URLs, in order; and the files of a folder that are not used.

    Raises:
        ValueError: If there is no such data set or split, or its files are not parquet.
    """
    if config is not None and (Path(name).is_file() or "://" in name or name == "digits"):
        raise ValueError(f"dataset_config={config!r}: dataset {name!r} has no configurations; leave dataset_config out")
    if Path(name).is_file() and name.endswith(".parquet"):
        return [name], []
    files = find_data_files(name, split, config)
    left_out = files_beside(Path(name), files) if Path(name).is_dir() else []
    if Path(name).is_dir():
        log(summary(name, None, left_out))
    if split not in files:
        raise ValueError(f"dataset {name!r} has no split {split!r}: one of {', '.join(files)}")
    other = [file for file in files[split] if not file.endswith(".parquet")]
    if other:
        raise ValueError(f"dataset {name!r} cannot be streamed: {other[0]!r} is not parquet, of which a stream is made")
    return files[split], left_out


def choose(size: int, max_samples: int | None, seed: int) -> Sequence[int]:
    """Returns which of `size` things to use, in order: all of them, or `max_samples` drawn at random.

    Raises:
        ValueError: If `max_samples` is less than 1.
    """
    check_max_samples(max_samples)
    if max_samples is None or max_samples >= size:
        return range(size)
    return torch.randperm(size, generator=generator(seed, SUBSET))[:max_samples].sort().values.tolist()


def check_max_samples(max_samples: int | None) -> None:
    """Raises a `ValueError` if a number of images is given that is less than 1."""
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples={max_samples} is not allowed: at least 1")


def _holds_files(kind: Any) -> bool:
    """Returns whether a column is one of images, or of their files: bytes alone, or beside a path."""
    if isinstance(kind, Value):
        return kind.dtype in ("binary", "large_binary")
    return isinstance(kind, Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _described(dataset: Dataset) -> str:
    kinds = {
        name: kind.dtype if isinstance(kind, Value) else type(kind).__name__ for name, kind in dataset.features.items()
    }
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
