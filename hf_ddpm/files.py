"""How a file is written that no reader, and no kill, ever finds half of; what others may read of paths and errors."""

import os
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


def public_name(name: str) -> str:
    """Returns a name as others may read it: of a path on this machine, or of a URL, only the last part."""
    is_path = "://" in name or name.startswith((".", "~")) or Path(name).is_absolute() or os.path.exists(name)
    return Path(name).name if is_path else name


def one_line(error: object) -> str:
    """Returns what an error says, without its line breaks."""
    return " ".join(str(error).split())
