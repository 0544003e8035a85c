"""How a file is written that no reader, and no kill, ever finds half of."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, writer: str = "") -> Iterator[Path]:
    """Yields another path to write to, and puts what is there in the place of `path` if all went well.

    Args:
        path: The file.
        writer: Tells several writers of the file apart, who may be at it at once.
    """
    partial = path.with_name(f".{path.name}{writer}.partial")
    yield partial
    partial.replace(path)
