"""Atomic file writes, and errors without line breaks."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, writer: str = "") -> Iterator[Path]:
    """Yields another path to write to, and puts what is there in the place of `path` if all went well, else away.

    Args:
        path: The file, or a folder.
        writer: Tells several writers of the file apart, who may be at it at once.
    """
    partial = path.with_name(f".{path.name}{writer}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def one_line(error: object) -> str:
    """Returns what an error says, without its line breaks."""
    return " ".join(str(error).split())
