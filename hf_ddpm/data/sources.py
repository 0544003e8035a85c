"""Open a dataset by name: the embedded digits, a folder, a file or a Hub id."""

import glob
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, get_dataset_config_names, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from hf_ddpm.config import DataConfig
from hf_ddpm.data import check_exists
from hf_ddpm.data.archives import is_archive, open_archives
from hf_ddpm.data.arrays import SUFFIXES as ARRAY_SUFFIXES
from hf_ddpm.data.caching import is_full, load_or_repair
from hf_ddpm.data.folders import METADATA_READERS, Opened, open_arrays, open_folder
from hf_ddpm.data.scan import Stamp, UnusedFile, image_suffixes, list_files, split_by_suffix, summary, with_full_paths
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.options import require_value
from hf_ddpm.utils.seeds import SUBSET, generator

Log = Callable[[str], object]


class DatasetError(ValueError):
    """Error while opening a dataset; the message contains its name."""


class MissingSplit(ValueError):
    """Error for a split that a dataset does not have; `splits` are the existing ones."""

    def __init__(self, message: str, splits: Sequence[str]):
        super().__init__(message)
        self.splits = list(splits)


def open_split(data: DataConfig, log: Log = lambda line: None) -> tuple[Dataset, list[UnusedFile]]:
    """Open a split of a dataset.

    Args:
        data: Options of the images: `dataset` is `digits` (embedded); a folder of images, arrays (`.npy`, `.npz`),
            archives or parquet files, or a folder written by `save_to_disk`; a parquet or array file, or an archive; or
            a Hub id.
        log: Called with a line about the files of a folder, and with one per damaged cache.

    Returns:
        The split, with images not decoded yet, and the unused files.

    Raises:
        MissingSplit: If the split does not exist.
        ValueError: If the dataset or its configuration does not exist, or it contains no images.
        OSError: If the disk of the cache is full.
    """
    name, split, opened = data.dataset, data.split, _open_splits(data, log)
    unused_files = opened.unused_files or []
    if opened.unused_files is not None:
        log(summary(name, {split: len(rows) for split, rows in opened.splits.items()}, unused_files))
    if split not in opened.splits:
        outside = [file.kind for file in unused_files if "outside the split folders" in file.kind]
        hint = f" (some images are {outside[0]})" if outside else ""
        message = f"--dataset {name}: no split {split!r}; expected one of {', '.join(opened.splits)}{hint}"
        raise MissingSplit(message, list(opened.splits))
    if len(opened.splits[split]) == 0:
        raise ValueError(f"--dataset {name}: split {split!r} contains no images")
    return opened.splits[split], unused_files


def find_shards(data: DataConfig, log: Log = lambda line: None) -> tuple[list[str], list[UnusedFile]]:
    """Find the parquet files of a split, without reading or downloading them.

    Args:
        data: Options of the images: `dataset` is `digits`, a folder of parquet files, a parquet file, a Hub id, or a
            URL or pattern of parquet files for `fsspec` (`https://`, `hf://`, `s3://`). A single file or a URL is used
            for any `split`.
        log: Called with a line about the files of a folder.

    Returns:
        Paths and URLs, in order, and the unused files of a folder.

    Raises:
        ValueError: If the dataset or split does not exist, or its files are not parquet.
    """
    name, split, path = data.dataset, data.split, Path(data.dataset)
    _check_config(data, path.is_file() or "://" in name or name == "digits")
    if path.is_file() and name.endswith(".parquet"):
        return [name], []
    files, unused_files = _data_files(data), []
    if path.is_dir():
        unused_files = with_full_paths(path, _unused(path, files))
        log(summary(name, None, unused_files))
    if split not in files:
        raise ValueError(f"--dataset {name}: no split {split!r}; expected one of {', '.join(files)}")
    other = [file for file in files[split] if not file.endswith(".parquet")]
    if other:
        raise ValueError(f"--dataset {name}: {other[0]!r} cannot be streamed; expected parquet files")
    return files[split], unused_files


def choose(size: int, max_samples: int | None, seed: int) -> Sequence[int]:
    """Return the indices of all of `size` items, or of `max_samples` items drawn at random, in order.

    Raises:
        ValueError: If `max_samples` is less than 1.
    """
    if max_samples is None or max_samples >= size:
        return range(size)
    require_value("max_samples", max_samples, max_samples >= 1, "at least 1")
    return torch.randperm(size, generator=generator(seed, SUBSET))[:max_samples].sort().values.tolist()


def _check_config(data: DataConfig, has_no_configs: bool) -> None:
    if data.dataset_config is not None and has_no_configs:
        raise ValueError(
            f"--dataset_config {data.dataset_config}: --dataset {data.dataset} has no configurations; "
            "remove --dataset_config"
        )


def _open_splits(data: DataConfig, log: Log) -> Opened:
    """Open all splits of a dataset."""
    name, config, path = data.dataset, data.dataset_config, Path(data.dataset)
    _check_config(data, name == "digits" or path.is_file())
    if name == "digits":
        return Opened(load_or_repair(lambda: load_dataset("parquet", data_files=_digits_files()), log))
    check_exists(data)
    try:
        if not path.exists():
            return Opened(load_or_repair(lambda: load_dataset(name, config), log))
        opened = _open_file(path, log) if path.is_file() else _open_folder(path, config, data.class_column, log)
    except DatasetError:
        raise
    except (DatasetGenerationError, OSError, ValueError) as error:
        if is_full(error) or isinstance(error, PermissionError):
            raise
        raise ValueError(f"--dataset {name}: {_reason(name, config, error)}") from error
    root = path.parent if path.is_file() else path
    return Opened(opened.splits, None if opened.unused_files is None else with_full_paths(root, opened.unused_files))


def _open_file(path: Path, log: Log) -> Opened:
    if path.suffix == ".parquet":
        table = {"train": glob.escape(str(path))}
        return Opened(load_or_repair(lambda: load_dataset("parquet", data_files=table), log))
    status = path.stat()
    files = {path.name: Stamp(status.st_size, status.st_mtime_ns)}
    if is_archive(path.name):
        return open_archives(path.parent, files, [], log)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return open_arrays(path.parent, files, [], log)
    raise DatasetError(
        f"--dataset {path}: unknown format; expected a parquet, .npy or .npz file, or an archive (zip, tar)"
    )


def _open_folder(path: Path, config: str | None, class_column: str | None, log: Log) -> Opened:
    """Open a folder by the formats of its files.

    `datasets` reads only folders with tables: it would mistake class folders such as testing_cats/ for splits.
    """
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if config is not None:
            reason = "a dataset saved by save_to_disk has no configurations; remove --dataset_config"
            raise DatasetError(f"--dataset_config {config}: {reason}")
        return Opened(_saved(path))
    files, unused_files = list_files(path)
    images, others = split_by_suffix(files, image_suffixes())
    tables = [
        name for name in split_by_suffix(files, [".parquet"])[0] if posixpath.basename(name) not in METADATA_READERS
    ]
    if tables or config is not None:
        builder = load_dataset_builder(str(path), config)
        if config is not None or not isinstance(builder, ImageFolder):
            splits = load_or_repair(lambda: load_dataset(str(path), config), log)
            return Opened(splits, _unused(path, builder.config.data_files or {}))
    if images:
        return open_folder(path, files, unused_files, class_column)
    arrays, without_arrays = split_by_suffix(files, ARRAY_SUFFIXES)
    if arrays:
        return open_arrays(path, {name: files[name] for name in arrays}, unused_files + without_arrays, log)
    archives = {name: files[name] for name in files if is_archive(name) and UnusedFile(name, "hidden") not in others}
    if archives:
        return open_archives(path, archives, unused_files + [file for file in others if file.file not in archives], log)
    unused = summary(str(path), None, unused_files + others).removeprefix(f"dataset {str(path)!r}: ")
    detail = f" ({unused})" if unused_files or others else ""
    raise DatasetError(f"--dataset {path}: folder contains no images{detail}")


def _saved(path: Path) -> Mapping[str, Dataset]:
    """Return the splits of a dataset written by `save_to_disk`."""
    try:
        saved = load_from_disk(str(path))
    except IndexError as error:  # raised by datasets if a split has no rows
        raise DatasetError(f"--dataset {path}: a split contains no images") from error
    if isinstance(saved, Dataset):
        # The split name may include the saved part, such as train[:100].
        return {re.split(r"\W", str(saved.split or "train"))[0]: saved}
    return saved


def _digits_files() -> dict[str, str]:
    folder = resources.files("hf_ddpm.data") / "digits"
    return {split: str(folder / f"{split}.parquet") for split in ("train", "test")}


def _data_files(data: DataConfig) -> dict[str, list[str]]:
    """Return the files of all splits, as found by `datasets`, without reading them."""
    name = data.dataset
    if name == "digits":
        return {split: [path] for split, path in _digits_files().items()}
    from_url = {"path": "parquet", "data_files": {data.split: name}}
    try:
        builder = load_dataset_builder(**(from_url if "://" in name else {"path": name, "name": data.dataset_config}))
    except (OSError, ValueError) as error:
        reason = _config_reason(name, data.dataset_config) or f"cannot be streamed: {one_line(error)}"
        raise ValueError(f"--dataset {name}: {reason}") from error
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def _unused(path: Path, data_files: Mapping[Any, Sequence[str]]) -> list[UnusedFile]:
    """Return the files of a folder that `datasets` does not read, each with the reason."""
    used = {os.path.relpath(file, path.absolute()) for files in data_files.values() for file in files}
    files, unused_files = list_files(path)
    names = [name for name in files if name not in used and name != "README.md"]
    unused, hidden = split_by_suffix(names, {posixpath.splitext(name)[1].lower() for name in names})
    suffixes = {posixpath.splitext(name)[1].lower() for name in used}
    read = " and ".join(sorted(suffixes)) or "no"
    for name in unused:
        suffix = posixpath.splitext(name)[1].lower() or "no suffix"
        kind = "not in a split of this configuration" if suffix in suffixes else f"only {read} files are read"
        unused_files.append(UnusedFile(name, f"{suffix}, {kind}"))
    return unused_files + hidden


def _reason(name: str, config: str | None, error: Exception) -> str:
    is_local, expected = Path(name).exists(), "expected a folder, a file, a Hub id or digits"
    if isinstance(error, ConnectionError):
        return f"does not exist as a local folder, and the Hub cannot be reached; {expected}"
    if isinstance(error, FileNotFoundError) and not is_local:
        return f"does not exist; {expected}"
    inner = (error.__cause__ or error) if isinstance(error, DatasetGenerationError) else error
    return _config_reason(name, config) or f"cannot be read: {one_line(inner)}"


def _config_reason(name: str, config: str | None) -> str | None:
    """Return the error in the configuration; None if no error is known."""
    try:
        names = get_dataset_config_names(name)
    except Exception:  # the dataset does not exist or cannot be read
        return None
    listed = ", ".join(names)
    if config is not None and config not in names:
        return f"no configuration {config!r}; expected --dataset_config with one of {listed}"
    several = f"has several configurations; expected --dataset_config with one of {listed}"
    return several if config is None and names[1:] else None
