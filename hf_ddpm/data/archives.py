"""Images in zip and tar archives, and tar archives of WebDataset, as tables of `datasets`."""

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

from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_ddpm.data.caching import load_sound
from hf_ddpm.data.folders import Opened
from hf_ddpm.data.layout import arrange, class_names
from hf_ddpm.data.scan import LeftOut, Stamp, image_suffixes, printable, printable_name, sort_out
from hf_ddpm.utils.files import one_line

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

# Texts beside an image of the same name, which WebDataset calls by their suffix.
SIDECARS = (".cls", ".txt")


def is_archive(name: str) -> bool:
    """Returns whether a file is an archive that is read, by its suffix."""
    return name.lower().endswith(SUFFIXES)


def open_archives(
    root: Path, files: Mapping[str, Stamp], left_out: Sequence[LeftOut], log: Callable[[str], object]
) -> Opened:
    """Opens archives of images; they are split and classed as if they were unpacked into folders of their names.

    Args:
        root: The folder that they are in.
        files: The archives, by their path relative to it.
        left_out: What else is not used there.
        log: Called with a line for each damaged cache.

    Returns:
        The splits: `image`, `label` where folders are classes, and `cls` and `txt` where files beside an image have
        these suffixes.

    Raises:
        ValueError: If an archive cannot be read, or there is no image in any.
    """
    members = {_place(archive, member): (archive, member) for archive in files for member in _members(root / archive)}
    images, others = sort_out(members, image_suffixes())
    if not images:
        raise ValueError(f"archive {str(root / next(iter(files)))!r} holds no image")
    layout = arrange(images)
    stem_of = {name: _stem(name, members) for name in images}
    beside = {stem + suffix for stem in stem_of.values() for suffix in SIDECARS} & members.keys()
    _check_single(stem_of, beside)
    inner = {name: _inner_folders(name, members[name][0], layout.level) for name in images}
    labels = class_names(inner[name] for names in layout.splits.values() for name in names)
    features = Features({"image": Image()})
    if labels is not None:
        features["label"] = ClassLabel(names=[printable_name(name) for name in labels])
    suffixes = {posixpath.splitext(name)[1] for name in beside}
    has_numbers = all(
        text.isdigit() for text in _texts(root, [members[name] for name in beside if name[-4:] == ".cls"])
    )
    kinds = {".cls": Value("int64" if has_numbers else "string"), ".txt": Value("string")}
    features |= {suffix[1:]: kinds[suffix] for suffix in SIDECARS if suffix in suffixes}
    splits = {}
    for split, names in layout.splits.items():
        plan: dict[str, dict[str, Any]] = {archive: {} for archive in files}
        for name in names:
            archive, member = members[name]
            texts = {s: members[t][1] for s in suffixes if (t := stem_of[name] + s) in members}
            plan[archive][member] = labels.index(inner[name][-1]) if labels else None, texts
        stamps = [(stamp.size, stamp.changed) for stamp in files.values()]
        options = {"root": str(root.absolute()), "plan": plan, "stamps": stamps, "has_numbers": has_numbers}
        make = partial(Dataset.from_generator, _rows, features=features, gen_kwargs={"options": options})
        splits[split] = load_sound(make, log)
    unused = [
        replace(file, file=posixpath.join(*members[file.file]))
        for file in (*others, *layout.left_out)
        if file.file not in beside
    ]
    return Opened(splits, [*left_out, *unused])


def _rows(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split; `stamps` is only part of the cache's key."""
    for archive, images in options["plan"].items():
        path = Path(options["root"]) / archive
        wanted = {member for _, texts in images.values() for member in texts.values()}
        texts_of = {member: data.decode(errors="replace") for member, data in _read(path, wanted)}
        for member, data in _read(path, images):
            label, texts = images[member]
            row: dict[str, Any] = {"image": {"bytes": data, "path": printable(str(path / member))}}
            row |= {} if label is None else {"label": label}
            for suffix in texts:
                text = texts_of[texts[suffix]].strip()
                row[suffix[1:]] = int(text) if suffix == ".cls" and options["has_numbers"] else text
            yield row


def _stem(name: str, members: Container[str]) -> str:
    """Returns the name of an image without its suffix, or before its first dot if WebDataset's texts are called so."""
    folder, file = posixpath.split(name)
    sample = posixpath.join(folder, file.split(".")[0])
    return sample if any(sample + suffix in members for suffix in SIDECARS) else posixpath.splitext(name)[0]


def _check_single(stem_of: Mapping[str, str], beside: Container[str]) -> None:
    """Raises a `ValueError` if several images share one text, as `0.rgb.png` and `0.depth.png` do."""
    first: dict[str, str] = {}
    for name, stem in stem_of.items():
        other = first.setdefault(stem, name)
        if other != name and any(stem + suffix in beside for suffix in SIDECARS):
            both = " and ".join(posixpath.basename(path) for path in (other, name))
            raise ValueError(f"a sample holds several images, {both}: expected one per sample")


def _texts(root: Path, members: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yields the contents of some members."""
    for archive in dict(members):
        wanted = {member for name, member in members if name == archive}
        yield from (data.decode(errors="replace").strip() for _, data in _read(root / archive, wanted))


def _place(archive: str, member: str) -> str:
    """Returns where a file would be if the archive was unpacked below a folder of its name without its number."""
    folder, name = posixpath.split(archive)
    stem = re.sub(r"([-_.]\d+(-of-\d+)?)?(\.tar)?\.[a-z0-9]+$", "", name.lower())
    return posixpath.join(folder, stem, name, posixpath.normpath(member).lstrip("/"))


def _inner_folders(place: str, archive: str, level: int | None) -> list[str]:
    """Returns the folders of a file in its archive, without that of its split."""
    outer = archive.count("/") + 2
    folders = place.split("/")[:-1]
    return [folder for depth, folder in enumerate(folders) if depth >= outer and depth != level]


def _members(path: Path) -> list[str]:
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                return [member.filename for member in archive.infolist() if not member.is_dir()]
        with tarfile.open(path) as archive:
            return [member.name for member in archive if member.isfile()]
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"archive {str(path)!r} cannot be read: {one_line(error)}") from error


def _read(path: Path, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Yields files of an archive, in the order in which it holds them; damaged ones are empty."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member in wanted:
                    yield member, _whole(partial(archive.read, member))
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name in wanted:
                yield member.name, archive.extractfile(member).read()


def _whole(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, NotImplementedError):
        return b""  # which is reported as an image that cannot be used
