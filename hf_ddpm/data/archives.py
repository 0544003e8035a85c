"""Open zip archives, tar archives and WebDataset shards of images as `datasets` tables."""

import lzma
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value

from hf_ddpm.data.caching import load_or_repair
from hf_ddpm.data.folders import Opened
from hf_ddpm.data.layout import find_layout
from hf_ddpm.data.scan import Stamp, UnusedFile, image_suffixes, printable, split_by_suffix
from hf_ddpm.utils.files import one_line

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

# Suffixes of text files that belong to the image of the same name, as in WebDataset; also the names of their columns.
SIDECARS = (".cls", ".txt")


def is_archive(name: str) -> bool:
    """Return whether a file is a supported archive, by its suffix."""
    return name.lower().endswith(SUFFIXES)


def open_archives(
    root: Path, files: Mapping[str, Stamp], unused_files: Sequence[UnusedFile], log: Callable[[str], object]
) -> Opened:
    """Open archives of images, given by their paths relative to a folder.

    Splits and classes are found as if each archive was unpacked into a folder of its name. The columns are `image`,
    `label` if folders are classes, and `cls` and `txt` if there are text files with these suffixes next to the images.

    Raises:
        ValueError: If an archive cannot be read, or no archive contains an image.
    """
    members = {
        _unpacked_path(archive, member): (archive, member) for archive in files for member in _members(root / archive)
    }
    images, others = split_by_suffix(members, image_suffixes())
    if not images:
        raise ValueError(
            f"archive {str(root / next(iter(files)))!r}: contains no images; expected at least one image file"
        )
    layout = find_layout(images)
    # Folders outside the archives, and the two that `_unpacked_path` adds per archive, are not classes.
    label, classes = layout.classes(lambda name: members[name][0].count("/") + 2)
    texts = _sidecars(images, members)
    suffix_of = {path: suffix for of_image in texts.values() for suffix, path in of_image.items()}
    has_numbers = _are_numbers(root, [members[path] for path, suffix in suffix_of.items() if suffix == ".cls"])
    kinds = {".cls": Value("int64" if has_numbers else "string"), ".txt": Value("string")}
    columns = {suffix[1:]: kinds[suffix] for suffix in SIDECARS if suffix in suffix_of.values()}
    splits = {}
    for split, names in layout.splits.items():
        plan: dict[str, dict[str, Any]] = {archive: {} for archive in files}
        for name in names:
            archive, member = members[name]
            plan[archive][member] = classes.get(name), {suffix: members[t][1] for suffix, t in texts[name].items()}
        stamps = [(stamp.size, stamp.changed) for stamp in files.values()]
        options = {"root": str(root.absolute()), "plan": plan, "stamps": stamps, "has_numbers": has_numbers}
        features = Features({"image": Image(), **label, **columns})
        make = partial(Dataset.from_generator, _rows, features=features, gen_kwargs={"options": options})
        splits[split] = load_or_repair(make, log)
    unused = [file for file in (*others, *layout.unused_files) if file.file not in suffix_of]
    return Opened(
        splits, [*unused_files, *(replace(file, file=posixpath.join(*members[file.file])) for file in unused)]
    )


def _rows(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split; the entry `stamps` of the options is only part of the cache key."""
    for archive, images in options["plan"].items():
        path = Path(options["root"]) / archive
        text_files = {member for _, texts in images.values() for member in texts.values()}
        text_of = {member: _text(data) for member, data in _read(path, text_files)}
        for member, data in _read(path, images):
            label, texts = images[member]
            row: dict[str, Any] = {"image": {"bytes": data, "path": printable(str(path / member))}}
            row |= {} if label is None else {"label": label}
            for suffix, text in texts.items():
                is_number = suffix == ".cls" and options["has_numbers"]
                row[suffix[1:]] = int(text_of[text]) if is_number else text_of[text]
            yield row


def _sidecars(images: Sequence[str], members: Container[str]) -> dict[str, dict[str, str]]:
    """Return the text files of each image, by suffix; raise a `ValueError` if two images share one."""
    texts: dict[str, dict[str, str]] = {}
    image_of: dict[str, str] = {}
    for name in images:
        folder, file = posixpath.split(name)
        # In WebDataset the name of a sample ends at the first dot: 0.cls belongs to 0.rgb.png.
        for stem in (posixpath.join(folder, file.split(".")[0]), posixpath.splitext(name)[0]):
            texts[name] = {suffix: stem + suffix for suffix in SIDECARS if stem + suffix in members}
            if texts[name]:
                other = image_of.setdefault(stem, name)
                if other != name:
                    both = " and ".join(posixpath.basename(path) for path in (other, name))
                    raise ValueError(f"a sample contains several images ({both}); expected one per sample")
                break
    return texts


def _are_numbers(root: Path, members: Sequence[tuple[str, str]]) -> bool:
    """Return whether all of these text files contain only a number."""
    for archive in dict(members):
        text_files = {member for name, member in members if name == archive}
        if not all(_text(data).isdigit() for _, data in _read(root / archive, text_files)):
            return False
    return True


def _text(data: bytes) -> str:
    return data.decode(errors="replace").strip()


def _unpacked_path(archive: str, member: str) -> str:
    """Return the path of a file if its archive was unpacked into a folder of its name without the shard number."""
    folder, name = posixpath.split(archive)
    stem = re.sub(r"([-_.]\d+(-of-\d+)?)?(\.tar)?\.[a-z0-9]+$", "", name.lower())
    return posixpath.join(folder, stem, name, posixpath.normpath(member).lstrip("/"))


def _members(path: Path) -> list[str]:
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                return [member.filename for member in archive.infolist() if not member.is_dir()]
        with tarfile.open(path) as archive:
            return [member.name for member in archive if member.isfile()]
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"archive {str(path)!r}: cannot be read: {one_line(error)}") from error


def _read(path: Path, members: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Yield some files of an archive, in archive order; damaged files of a zip archive are empty."""
    if not path.name.lower().endswith(".zip"):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name in members:
                    yield member.name, archive.extractfile(member).read()
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name in members:
                try:
                    data = archive.read(name)
                except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, NotImplementedError):
                    data = b""  # decoding reports it as an unusable image
                yield name, data
