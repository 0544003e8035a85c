"""Files of a folder, links followed, and the reason for each one that is not used."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote_to_bytes

from PIL import Image

# Formats that Pillow recognizes without being able to decode them.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

REMEDIES = {
    ".heic": "install pillow-heif",
    ".heif": "install pillow-heif",
    ".avif": "install Pillow 11.3 or later",
    ".npy": "arrays are read from folders without pictures",
    ".npz": "arrays are read from folders without pictures",
}

# Folders named in the line that sums up what is not used; the report of bad images lists all files.
NAMED_KINDS = 12


@dataclass(frozen=True)
class LeftOut:
    """A file that is not used.

    Attributes:
        file: Its path.
        kind: The reason, in words that other files share: they are counted by it.
        remedy: A way to use it, if there is one.
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
    """Size and time of the last change of a file, by which a changed file is recognized."""

    size: int
    changed: int


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of files that are images, in lower case, such as `.png`: new formats are added here."""
    register_plugins()
    kinds = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in kinds if kind in Image.OPEN and kind not in NOT_DECODED)


@cache
def register_plugins() -> None:
    """Registers formats that Pillow reads with installed plugins: HEIC by pillow-heif."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def list_files(root: Path) -> tuple[dict[str, Stamp], list[LeftOut]]:
    """Lists the files below a folder; links to files and folders are followed, but never in circles.

    Returns:
        The regular files by their path relative to the folder, with `/`, sorted; and what cannot be followed or read.
    """
    files: dict[str, Stamp] = {}
    left_out: list[LeftOut] = []
    _visit(root, "", (), files, left_out)
    return {name: files[name] for name in sorted(files)}, left_out


def sort_out(names: Iterable[str], suffixes: Iterable[str]) -> tuple[list[str], list[LeftOut]]:
    """Divides files into those with one of some suffixes, in lower case, and all others, each with its reason.

    Hidden files, and those in `__folders__` such as `__MACOSX`, are never used, as in `datasets`.
    """
    used, left_out = [], []
    known = frozenset(suffixes)
    for name in names:
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts):
            left_out.append(LeftOut(name, "hidden"))
        elif any(part.startswith("__") for part in path.parts[:-1]):
            left_out.append(LeftOut(name, f"in {next(part for part in path.parts if part.startswith('__'))}/"))
        elif path.suffix.lower() in known:
            used.append(name)
        else:
            suffix = path.suffix.lower()
            kind = f"unknown format {suffix}" if suffix else "no suffix"
            left_out.append(LeftOut(name, kind, REMEDIES.get(suffix)))
    return used, left_out


def summary(name: str, counts: Mapping[str, int] | None, left_out: Iterable[LeftOut]) -> str:
    """Returns one line on a data set: the images of each split, if known, and how many files are unused, by reason."""
    images = ", ".join(f"{count:,} images in {split}" for split, count in (counts or {}).items())
    kinds = Counter((file.kind, file.remedy) for file in left_out)
    most = kinds.most_common(NAMED_KINDS)
    lines = [
        f"{printable_name(kind)}: {count:,}" + (f" ({remedy})" if remedy else "") for (kind, remedy), count in most
    ]
    rest = kinds.total() - sum(count for _, count in most)
    lines += [f"other: {rest:,}"] if rest else []
    unused = f"files not used: {', '.join(lines)}" if lines else "all files are used"
    return f"dataset {name!r}: " + (f"{images}; " if images else "") + unused


def below(root: Path, files: Iterable[LeftOut]) -> list[LeftOut]:
    """Returns files of a folder with their whole paths."""
    return [replace(file, file=printable(str(root / file.file))) for file in files]


def printable(path: str) -> str:
    """Returns a path as text that can be printed and stored: one that is not UTF-8 becomes a `file:` URL."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(os.path.abspath(path)).as_uri()
    return path


def as_path(name: str) -> str:
    """Returns the path that `printable` made a name of."""
    return os.fsdecode(unquote_to_bytes(name.removeprefix("file://"))) if name.startswith("file:///") else name


def printable_name(name: str) -> str:
    """Returns a name, such as that of a class, with escapes in place of what is not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _visit(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...], files: dict[str, Stamp], left_out: list[LeftOut]
) -> None:
    try:
        here = os.stat(folder)
        names = os.listdir(folder)
    except OSError:
        left_out.append(LeftOut(prefix, "folder that cannot be read"))
        return
    above = (*above, (here.st_dev, here.st_ino))
    for name in names:
        try:
            status = os.stat(folder / name)
        except OSError:
            is_link = os.path.islink(folder / name)
            left_out.append(LeftOut(prefix + name, "link that leads nowhere" if is_link else "unreadable"))
            continue
        if stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in above:
                left_out.append(LeftOut(prefix + name, "link to a folder that it is in"))
            else:
                _visit(folder / name, f"{prefix}{name}/", above, files, left_out)
        elif stat.S_ISREG(status.st_mode):
            files[prefix + name] = Stamp(status.st_size, status.st_mtime_ns)
        else:
            left_out.append(LeftOut(prefix + name, "neither a file nor a folder"))
