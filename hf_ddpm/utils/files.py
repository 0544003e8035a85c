"""Atomic, durable file writes, and errors in one line."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# Errors of file systems that cannot flush a folder.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


@contextmanager
def atomic_write(path: Path, writer: str = "", durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to. On success it replaces `path`; on an error it is removed.

    With `durable`, the contents are flushed to disk before the rename, and the rename before this function returns: a
    crash of the machine leaves the old file or the new one.

    Args:
        path: The file; or a folder, which must be new or empty.
        writer: Suffix of the temporary name, different for each process that may write the file at the same time.
        durable: If false, do not flush to disk; a crash of the machine (not of the process) may then lose the file.

    Raises:
        OSError: If the file cannot be written; the message names `path`.
    """
    partial = path.with_name(f".{path.name}{writer}.partial")
    try:
        with naming(path):
            yield partial
            if durable:
                flush(partial)
            partial.replace(path)
            if durable:
                flush_entry(path.parent)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write text as UTF-8, atomically; see `atomic_write`."""
    with atomic_write(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Convert errors of writing, which often name no file, to an `OSError` that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if "cannot be written" in str(error):  # converted already
            raise
        named = OSError(f"{path}: file cannot be written: {getattr(error, 'strerror', None) or one_line(error)}")
        named.errno = getattr(error, "errno", None)
        raise named from error


def flush(path: Path) -> None:
    """Flush a file, or a folder with all its contents, to disk."""
    if path.is_dir():
        for child in path.iterdir():
            flush(child)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Flush one file, or the directory entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in UNSUPPORTED):
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path, option: str) -> None:
    """Create a folder and check that files can be written to it.

    Args:
        folder: The folder.
        option: The option that names the folder or a file in it, for the error message.

    Raises:
        ValueError: If files cannot be written to the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(f"--{option} {folder}: folder is not writable: {error.strerror}") from error


def check_free(folder: Path) -> None:
    """Raise a `ValueError` unless the folder of `--output` is new or empty; a lock file does not count."""
    if folder.is_file() or (folder.is_dir() and any(file.name != ".lock" for file in folder.iterdir())):
        reason = "is a file" if folder.is_file() else "folder is not empty"
        raise ValueError(f"--output {folder}: {reason}; expected a new or empty folder")


def one_line(error: object) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split())


def count_of(number: int, thing: str) -> str:
    """Return a number with its noun: "1 image", "1,000 images"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
