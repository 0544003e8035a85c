"""List the files of a folder, with a reason for each unused file."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote_to_bytes

from PIL import Image

from hf_ddpm.utils.files import count_of

# Formats that Pillow recognizes but cannot decode.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

REMEDIES = {
    ".heic": "install pillow-heif",
    ".heif": "install pillow-heif",
    ".avif": "install Pillow 11.3 or later",
    ".npy": "arrays are read only from folders without image files",
    ".npz": "arrays are read only from folders without image files",
}

# Largest number of reasons in the summary of unused files; the report of bad images lists all files.
NAMED_KINDS = 12


@dataclass(frozen=True)
class UnusedFile:
    """An unused file.

    Attributes:
        file: Its path.
        kind: The general reason; files with the same one are counted together.
        remedy: How to use the file, if possible.
    """

    file: str
    kind: str
    remedy: str | None = None

    @property
    def reason(self) -> str:
        """The kind and the remedy."""
        return self.kind + (f" ({self.remedy})" if self.remedy else "")


@dataclass(frozen=True)
class Stamp:
    """Size and modification time of a file, to detect changes."""

    size: int
    changed: int


@cache
def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of all supported image formats, such as `.png`; add new formats here."""
    register_plugins()
    kinds = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in kinds if kind in Image.OPEN and kind not in NOT_DECODED)


@cache
def register_plugins() -> None:
    """Register the formats of installed Pillow plugins: HEIC with pillow-heif."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def list_files(root: Path) -> tuple[dict[str, Stamp], list[UnusedFile]]:
    """List the files of a folder and its subfolders; links are followed, except in cycles.

    Returns:
        The regular files, sorted by their path relative to the folder, with `/`; and entries that cannot be read.
    """
    files: dict[str, Stamp] = {}
    unused_files: list[UnusedFile] = []
    _visit(root, "", (), files, unused_files)
    return {name: files[name] for name in sorted(files)}, unused_files


def split_by_suffix(names: Iterable[str], suffixes: Iterable[str]) -> tuple[list[str], list[UnusedFile]]:
    """Divide files into those with one of the lower-case suffixes, and all others with the reason.

    Hidden files, and files in folders such as `__MACOSX` that start with `__`, are never used, as in `datasets`.
    """
    used, unused_files = [], []
    known = frozenset(suffixes)
    for name in names:
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts):
            unused_files.append(UnusedFile(name, "hidden"))
        elif any(part.startswith("__") for part in path.parts[:-1]):
            unused_files.append(UnusedFile(name, f"in {next(part for part in path.parts if part.startswith('__'))}/"))
        elif path.suffix.lower() in known:
            used.append(name)
        else:
            suffix = path.suffix.lower()
            kind = f"unknown format {suffix}" if suffix else "no suffix"
            unused_files.append(UnusedFile(name, kind, REMEDIES.get(suffix)))
    return used, unused_files


def summary(name: str, counts: Mapping[str, int] | None, unused_files: Iterable[UnusedFile]) -> str:
    """Return one line about a dataset: the images per split, if known, and the unused files per reason."""
    images = ", ".join(f"{count_of(count, 'image')} in {split}" for split, count in (counts or {}).items())
    kinds = Counter((file.kind, file.remedy) for file in unused_files)
    most = kinds.most_common(NAMED_KINDS)
    lines = [
        f"{printable_name(kind)}: {count:,}" + (f" ({remedy})" if remedy else "") for (kind, remedy), count in most
    ]
    rest = kinds.total() - sum(count for _, count in most)
    lines += [f"other: {rest:,}"] if rest else []
    unused = f"unused files: {', '.join(lines)}" if lines else "all files are used"
    return f"dataset {name!r}: " + (f"{images}; " if images else "") + unused


def with_full_paths(root: Path, files: Iterable[UnusedFile]) -> list[UnusedFile]:
    """Return files of a folder with their full paths."""
    return [replace(file, file=printable(str(root / file.file))) for file in files]


def printable(path: str) -> str:
    """Return a path as printable text; a path that is not valid UTF-8 becomes a `file:` URL."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(os.path.abspath(path)).as_uri()
    return path


def as_path(name: str) -> str:
    """Return the path of a name made by `printable`."""
    return os.fsdecode(unquote_to_bytes(name.removeprefix("file://"))) if name.startswith("file:///") else name


def printable_name(name: str) -> str:
    """Return a name, such as the name of a class, with bytes that are not valid UTF-8 escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _visit(
    folder: Path,
    prefix: str,
    above: tuple[tuple[int, int], ...],
    files: dict[str, Stamp],
    unused_files: list[UnusedFile],
) -> None:
    try:
        here = os.stat(folder)
        names = os.listdir(folder)
    except OSError:
        unused_files.append(UnusedFile(prefix, "unreadable folder"))
        return
    above = (*above, (here.st_dev, here.st_ino))
    for name in names:
        try:
            status = os.stat(folder / name)
        except OSError:
            is_link = os.path.islink(folder / name)
            unused_files.append(UnusedFile(prefix + name, "broken link" if is_link else "unreadable"))
            continue
        if stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in above:
                unused_files.append(UnusedFile(prefix + name, "link to a parent folder"))
            else:
                _visit(folder / name, f"{prefix}{name}/", above, files, unused_files)
        elif stat.S_ISREG(status.st_mode):
            files[prefix + name] = Stamp(status.st_size, status.st_mtime_ns)
        else:
            unused_files.append(UnusedFile(prefix + name, "not a regular file or folder"))
