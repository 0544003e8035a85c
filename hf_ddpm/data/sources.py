"""Where images come from: the embedded digits, a folder, parquet files, or the Hub. All end as a `datasets.Dataset`."""

import glob
from importlib import resources
from pathlib import Path

from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL.Image import registered_extensions

# Folders of these names at the top are splits; all other folders are classes.
SPLITS = ("train", "validation", "test")

# In this order: what image columns are mostly called.
USUAL_COLUMNS = ("image", "img", "images", "pixel_values", "picture")


def open_dataset(name: str, split: str = "train") -> Dataset:
    """Opens a split of a data set.

    Args:
        name: `digits` (embedded), a folder of images or of parquet files, a parquet file, or an id on the Hub.
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


def _load(name: str) -> DatasetDict:
    if name == "digits":
        folder = resources.files("hf_ddpm.data") / "digits"
        return load_dataset("parquet", data_files={s: str(folder / f"{s}.parquet") for s in ("train", "test")})
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"dataset {name!r} is not there: a folder, a parquet file, a Hub id or digits is allowed")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"dataset {name!r} is not allowed: of files, only parquet is")
    try:
        if path.is_file():
            return load_dataset("parquet", data_files={"train": glob.escape(name)})
        return _load_folder(path) if path.is_dir() else load_dataset(name)
    except FileNotFoundError as error:
        what = "is empty: the folder holds no image" if path.is_dir() else "is neither a folder here nor on the Hub"
        raise ValueError(f"dataset {name!r} {what}") from error
    except ConnectionError as error:
        raise ValueError(f"dataset {name!r} is no folder here, and the Hub cannot be reached") from error
    except (DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"dataset {name!r} cannot be read: {reason}") from error


def _load_folder(path: Path) -> DatasetDict:
    """Loads a folder; left to itself, `datasets` takes class folders such as testing_cats/ for splits."""
    if any(path.rglob("*.parquet")):
        return load_dataset(str(path))
    if not any(file.suffix.lower() in registered_extensions() for file in path.rglob("*")):
        raise FileNotFoundError
    splits = [name for name in SPLITS if (path / name).is_dir()]
    root = Path(glob.escape(str(path)))
    files = {name: str(root / name / "**") for name in splits} or {"train": str(root / "**")}
    return load_dataset("imagefolder", data_files=files)


def _described(dataset: Dataset) -> str:
    return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in dataset.features.items())
