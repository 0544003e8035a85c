"""Detect and repair `datasets` caches that a killed process or a full disk has damaged."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from datasets import Dataset, DatasetDict, config

T = TypeVar("T", Dataset, DatasetDict)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def load_or_repair(load: Callable[[], T], log: Callable[[str], object]) -> T:
    """Return the result of `load`; damaged caches are logged, removed and rebuilt.

    Raises:
        OSError: If the disk of the cache is full; the message names the folder.
    """
    with explain_full_disk():
        try:
            loaded = load()
            if _is_complete(loaded):
                return loaded
        except Exception as error:  # loaders raise many types
            if is_full(error) or not remove_damaged(log):
                raise
        else:
            remove_damaged(log)
        return load()


def remove_damaged(log: Callable[[str], object]) -> bool:
    """Remove cached datasets with truncated files; return whether there were any."""
    cached = [path for path in cache_folder().rglob("dataset_info.json") if not _is_of_user(path.parent)]
    damaged = [path.parent for path in cached if not _is_intact(path)]
    for folder in damaged:
        shutil.rmtree(folder, ignore_errors=True)
        log(f"cache {folder} was damaged: rebuilding it")
    return bool(damaged)


def read_decoded(path: Path, rows: int, log: Callable[[str], object]) -> Dataset | None:
    """Return a cached table with `rows` rows; None if it does not exist, or was damaged and is now removed."""
    if not path.exists():
        return None
    try:
        table = Dataset.from_file(str(path))
        if len(table) == rows:
            return table
    except (OSError, ValueError):
        pass
    path.unlink(missing_ok=True)
    log(f"cache {path} was damaged: rebuilding it")
    return None


@contextmanager
def explain_full_disk() -> Iterator[None]:
    """Replace a full-disk error by one that names the cache folder and how to choose another."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        hint = "free some space, or set HF_DATASETS_CACHE or HF_HOME to a folder on another disk"
        raise OSError(f"cache {str(cache_folder())!r}: the disk is full; {hint}") from error


def is_full(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in FULL or "Not enough disk space" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def cache_folder() -> Path:
    """Return the cache folder of `datasets`."""
    return Path(config.HF_DATASETS_CACHE)


def _is_complete(loaded: Dataset | DatasetDict) -> bool:
    splits = loaded if isinstance(loaded, DatasetDict) else {str(loaded.split): loaded}
    infos = {name: (data.info.splits or {}).get(name) for name, data in splits.items()}
    return all(info is None or info.num_examples == len(splits[name]) for name, info in infos.items())


def _is_of_user(folder: Path) -> bool:
    """Return whether a folder was saved by a user and is not a cache."""
    return (folder / "state.json").exists() or any(folder.glob("*.parquet"))


def _is_intact(info: Path) -> bool:
    """Return whether a cached dataset is readable and has as many rows as its description."""
    try:
        splits = json.loads(info.read_text(encoding="utf-8"))["splits"]
        rows = sum(_rows(path) for path in info.parent.glob("*.arrow") if not path.name.startswith("cache-"))
        return rows == sum(split["num_examples"] for split in splits.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _rows(path: Path) -> int:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all().num_rows
