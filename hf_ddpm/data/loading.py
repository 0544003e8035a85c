"""Opening data sets by name: what kind of folder or file it is, and which files are used."""

import glob
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from datasets import Dataset, get_dataset_config_names, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from hf_ddpm.data.archives import is_archive, open_archives
from hf_ddpm.data.array_files import open_arrays
from hf_ddpm.data.arrays import SUFFIXES as ARRAY_SUFFIXES
from hf_ddpm.data.caching import is_full, load_sound
from hf_ddpm.data.folders import READERS, Opened, open_folder
from hf_ddpm.data.scan import LeftOut, Stamp, image_suffixes, list_files, printable, sort_out, summary
from hf_ddpm.utils.files import one_line

Log = Callable[[str], object]


class _Refused(ValueError):
    """A data set cannot be opened; the message names it."""


def open_splits(name: str, config: str | None, class_column: str | None, log: Log) -> Opened:
    """Opens all splits of a data set; arguments and errors as of `open_split`."""
    path = Path(name)
    if config is not None and (name == "digits" or path.is_file()):
        raise ValueError(f"dataset_config={config!r}: dataset {name!r} has no configurations; leave dataset_config out")
    if name == "digits":
        return Opened(load_sound(lambda: load_dataset("parquet", data_files=digits_files()), log))
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"dataset {name!r} is not there: a folder, a parquet file, a Hub id or digits is allowed")
    try:
        if path.is_file():
            return _located(path.parent, _open_file(path, log))
        if path.is_dir():
            return _located(path, _open_folder(path, config, class_column, log))
        return Opened(load_sound(lambda: load_dataset(name, config), log))
    except _Refused:
        raise
    except (DatasetGenerationError, OSError, ValueError) as error:
        if is_full(error) or isinstance(error, PermissionError):
            raise
        raise ValueError(f"dataset {name!r} {_reason(name, config, error)}") from error


def find_data_files(name: str, split: str, config: str | None) -> dict[str, list[str]]:
    """Returns the files of all splits, as `datasets` finds them, without reading them.

    Raises:
        ValueError: If there is no such data set or configuration.
    """
    if name == "digits":
        return {split: [path] for split, path in digits_files().items()}
    from_url = {"path": "parquet", "data_files": {split: name}}
    try:
        builder = load_dataset_builder(**(from_url if "://" in name else {"path": name, "name": config}))
    except (OSError, ValueError) as error:
        reason = _config_reason(name, config) or f"cannot be streamed: {one_line(error)}"
        raise ValueError(f"dataset {name!r} {reason}") from error
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def files_beside(path: Path, data_files: Mapping[Any, Sequence[str]]) -> list[LeftOut]:
    """Returns the files of a folder that are not among those that `datasets` reads, each with the reason."""
    return [_with_path(path, file) for file in _files_beside(path, data_files)]


def _files_beside(path: Path, data_files: Mapping[Any, Sequence[str]]) -> list[LeftOut]:
    used = {os.path.relpath(file, path.absolute()) for files in data_files.values() for file in files}
    files, left_out = list_files(path)
    names = [name for name in files if name not in used and name != "README.md"]
    beside, hidden = sort_out(names, {posixpath.splitext(name)[1].lower() for name in names})
    suffixes = {posixpath.splitext(name)[1].lower() for name in used}
    read = " and ".join(sorted(suffixes)) or "no"
    for name in beside:
        suffix = posixpath.splitext(name)[1].lower() or "no suffix"
        kind = "in no split of this configuration" if suffix in suffixes else f"beside the {read} files"
        left_out.append(LeftOut(name, f"{suffix}, {kind}"))
    return left_out + hidden


def digits_files() -> dict[str, str]:
    """Returns the embedded files of the digits, by split."""
    folder = resources.files("hf_ddpm.data") / "digits"
    return {split: str(folder / f"{split}.parquet") for split in ("train", "test")}


def _with_path(root: Path, file: LeftOut) -> LeftOut:
    return replace(file, file=printable(str(root / file.file)))


def _located(root: Path, opened: Opened) -> Opened:
    """Returns a data set whose files that are not used have their whole paths."""
    if opened.left_out is None:
        return opened
    return replace(opened, left_out=[_with_path(root, file) for file in opened.left_out])


def _open_file(path: Path, log: Log) -> Opened:
    if path.suffix == ".parquet":
        table = {"train": glob.escape(str(path))}
        return Opened(load_sound(lambda: load_dataset("parquet", data_files=table), log))
    status = path.stat()
    files = {path.name: Stamp(status.st_size, status.st_mtime_ns)}
    if is_archive(path.name):
        return open_archives(path.parent, files, [], log)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return open_arrays(path.parent, files, [], log)
    raise _Refused(
        f"dataset {str(path)!r} is not allowed: of files, only parquet, .npy and .npz are, and archives (zip, tar)"
    )


def _open_folder(path: Path, config: str | None, class_column: str | None, log: Log) -> Opened:
    """Opens a folder by its files; left to itself, `datasets` takes class folders such as testing_cats/ for splits."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if config is not None:
            raise _Refused(f"dataset_config={config!r}: a data set that was saved to disk has no configurations")
        return Opened(_saved(path))
    files, left_out = list_files(path)
    images, others = sort_out(files, image_suffixes())
    tables = [name for name in sort_out(files, [".parquet"])[0] if posixpath.basename(name) not in READERS]
    if tables or config is not None:
        builder = load_dataset_builder(str(path), config)
        if config is not None or not isinstance(builder, ImageFolder):
            splits = load_sound(lambda: load_dataset(str(path), config), log)
            return Opened(splits, _files_beside(path, builder.config.data_files or {}))
    if images:
        return open_folder(path, files, left_out, class_column)
    arrays, without_arrays = sort_out(files, ARRAY_SUFFIXES)
    if arrays:
        stamps = {name: files[name] for name in arrays}
        return open_arrays(path, stamps, left_out + without_arrays, log)
    archives = {name: files[name] for name in files if is_archive(name) and LeftOut(name, "hidden") not in others}
    if archives:
        return open_archives(path, archives, left_out + [file for file in others if file.file not in archives], log)
    unused = summary(str(path), None, left_out + others).removeprefix(f"dataset {str(path)!r}: ")
    detail = f" ({unused})" if left_out or others else ""
    raise _Refused(f"dataset {str(path)!r} is empty: the folder holds no image{detail}")


def _saved(path: Path) -> Mapping[str, Dataset]:
    """Returns the splits that `save_to_disk` has written."""
    saved = load_from_disk(str(path))
    if isinstance(saved, Dataset):
        # The name of a split may come with the part of it that was saved, such as train[:100].
        return {re.split(r"\W", str(saved.split or "train"))[0]: saved}
    return saved


def _reason(name: str, config: str | None, error: Exception) -> str:
    is_local = Path(name).exists()
    if isinstance(error, ConnectionError):
        return "is no folder here, and the Hub cannot be reached"
    if isinstance(error, FileNotFoundError) and not is_local:
        return "is neither a folder here nor on the Hub"
    inner = (error.__cause__ or error) if isinstance(error, DatasetGenerationError) else error
    return _config_reason(name, config) or f"cannot be read: {one_line(inner)}"


def _config_reason(name: str, config: str | None) -> str | None:
    """Returns what is wrong with the configuration; None if it is not known to be wrong."""
    try:
        names = get_dataset_config_names(name)
    except Exception:  # the data set is not there, or cannot be read
        return None
    known = ", ".join(names)
    if config is not None and config not in names:
        return f"has no configuration dataset_config={config!r}: one of {known}"
    return f"has several configurations, name one by dataset_config: {known}" if config is None and names[1:] else None
