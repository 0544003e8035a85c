"""Where images come from: the embedded digits, a folder, parquet files, or the Hub. All end as a `datasets.Dataset`."""

import glob
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Image, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from PIL.Image import registered_extensions

from hf_ddpm.data.array_files import load_arrays
from hf_ddpm.data.arrays import SUFFIXES as ARRAY_SUFFIXES
from hf_ddpm.files import one_line
from hf_ddpm.seeds import SUBSET, generator

# Folders of these names at the top are splits; all other folders are classes.
SPLITS = ("train", "validation", "test")

# In this order: what image columns are mostly called.
USUAL_COLUMNS = ("image", "img", "images", "pixel_values", "picture")


def open_dataset(name: str, split: str = "train") -> Dataset:
    """Opens a split of a data set.

    Args:
        name: `digits` (embedded), a folder of images, of arrays (`.npy`, `.npz`) or of parquet files, a parquet or
            array file, or an id on the Hub.
        split: Name of the split.

    Returns:
        The split, as `datasets` reads it; images are not decoded yet.

    Raises:
        ValueError: If there is no such data set or split, or no image in it.
    """
    splits = _load(name)
    if split not in splits:
        raise ValueError(f"dataset {name!r} has no split {split!r}: one of {', '.join(splits)}")
    if len(splits[split]) == 0:
        raise ValueError(f"dataset {name!r} is empty: split {split!r} holds no image")
    return splits[split]


def find_image_column(dataset: Dataset, name: str | None = None) -> str:
    """Returns the column that holds the images: the one named, or the one that looks like it.

    Args:
        dataset: An opened split.
        name: Name of the column; guessed if None.

    Returns:
        The name of a column of type `datasets.Image`.

    Raises:
        ValueError: If there is no such column, or none that looks like it, or more than one.
    """
    columns = dataset.column_names
    images = [column for column in columns if isinstance(dataset.features[column], Image)]
    if name is not None:
        if name not in images:
            what = "holds no images" if name in columns else "does not exist"
            raise ValueError(f"image_column={name!r} {what}: columns are {_described(dataset)}")
        return name
    usual = [column for column in USUAL_COLUMNS if column in images]
    if not usual and len(images) != 1:
        raise ValueError(f"no image column was recognized, name it by image_column: columns are {_described(dataset)}")
    return (usual or images)[0]


def find_shards(name: str, split: str = "train") -> list[str]:
    """Finds the parquet files of a split, without reading or fetching them.

    Args:
        name: `digits`, a folder of parquet files, a parquet file, an id on the Hub, or a URL or pattern of parquet
            files that `fsspec` knows how to open (`https://`, `hf://`, `s3://`).
        split: Name of the split; a single file and a URL are taken for the one asked for.

    Returns:
        Paths and URLs, in order.

    Raises:
        ValueError: If there is no such data set or split, or its files are not parquet.
    """
    if Path(name).is_file() and name.endswith(".parquet"):
        return [name]
    try:
        files = _data_files(name, split)
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset {name!r} cannot be streamed: {one_line(error)}") from error
    if split not in files:
        raise ValueError(f"dataset {name!r} has no split {split!r}: one of {', '.join(files)}")
    other = [file for file in files[split] if not file.endswith(".parquet")]
    if other:
        raise ValueError(f"dataset {name!r} cannot be streamed: {other[0]!r} is not parquet, of which a stream is made")
    return files[split]


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


def _load(name: str) -> DatasetDict:
    if name == "digits":
        return load_dataset("parquet", data_files=_digits())
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"dataset {name!r} is not there: a folder, a parquet file, a Hub id or digits is allowed")
    if path.is_file() and path.suffix not in (".parquet", *ARRAY_SUFFIXES):
        raise ValueError(f"dataset {name!r} is not allowed: of files, only .parquet, .npy and .npz are")
    try:
        if path.is_file() and path.suffix in ARRAY_SUFFIXES:
            return load_arrays({"train": path})
        if path.is_file():
            return load_dataset("parquet", data_files={"train": glob.escape(name)})
        return _load_folder(path) if path.is_dir() else load_dataset(name)
    except FileNotFoundError as error:
        what = "is empty: the folder holds no image" if path.is_dir() else "is neither a folder here nor on the Hub"
        raise ValueError(f"dataset {name!r} {what}") from error
    except ConnectionError as error:
        raise ValueError(f"dataset {name!r} is no folder here, and the Hub cannot be reached") from error
    except (DatasetGenerationError, ValueError) as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"dataset {name!r} cannot be read: {reason}") from error


def _digits() -> dict[str, str]:
    folder = resources.files("hf_ddpm.data") / "digits"
    return {split: str(folder / f"{split}.parquet") for split in ("train", "test")}


def _data_files(name: str, split: str) -> dict[str, list[str]]:
    """Returns the files of all splits, as `datasets` finds them."""
    if name == "digits":
        return {split: [path] for split, path in _digits().items()}
    from_url = {"path": "parquet", "data_files": {split: name}}
    builder = load_dataset_builder(**(from_url if "://" in name else {"path": name}))
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def _load_folder(path: Path) -> DatasetDict:
    """Loads a folder; left to itself, `datasets` takes class folders such as testing_cats/ for splits."""
    if any(path.rglob("*.parquet")):
        return load_dataset(str(path))
    splits = [name for name in SPLITS if (path / name).is_dir()]
    if not any(file.suffix.lower() in registered_extensions() for file in path.rglob("*")):
        return load_arrays({name: path / name for name in splits} or {"train": path})
    root = Path(glob.escape(str(path)))
    files = {name: str(root / name / "**") for name in splits} or {"train": str(root / "**")}
    return load_dataset("imagefolder", data_files=files)


def _described(dataset: Dataset) -> str:
    return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in dataset.features.items())
