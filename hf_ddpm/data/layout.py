"""Find the splits and classes of images by their folders."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from datasets import ClassLabel, Features

from hf_ddpm.data.scan import UnusedFile, printable_name

# Folder names of each split, as in `datasets`.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}


@dataclass(frozen=True)
class Layout:
    """A division of files into splits.

    Attributes:
        splits: The files of each split.
        unused_files: Files outside the split folders.
        level: Position of the split folder in a path, from 0; None if there are no split folders.
    """

    splits: dict[str, list[str]]
    unused_files: list[UnusedFile] = field(default_factory=list)
    level: int | None = None

    def classes(self, outer: Callable[[str], int] = lambda name: 0) -> tuple[Features, dict[str, int]]:
        """Find the classes of files by folder, ignoring split folders and the first `outer(name)` folders.

        Returns:
            The feature `label`, whose classes are the sorted innermost folders, and the class index of each file; both
            are empty unless all files have the same folder depth and there are at least two classes.
        """
        inner = {}
        for name in (name for names in self.splits.values() for name in names):
            folders = enumerate(name.split("/")[:-1])
            inner[name] = [folder for level, folder in folders if level >= outer(name) and level != self.level]
        names = sorted({folders[-1] for folders in inner.values() if folders})
        if len({len(folders) for folders in inner.values()}) != 1 or len(names) < 2:
            return Features(), {}
        indices = {name: index for index, name in enumerate(names)}
        label = ClassLabel(names=[printable_name(name) for name in names])
        return Features(label=label), {name: indices[folders[-1]] for name, folders in inner.items()}


def find_layout(names: Sequence[str]) -> Layout:
    """Find the splits of files by folder.

    If folders of two splits are at the same depth, such as train/ and val/, they are the splits at any depth, and files
    outside them are not used, so held-out images never become training images. A single train/, validation/ or test/ at
    the top is a split if no other folder there has images; a validation/ or test/ next to other folders is also one. A
    train/ next to folders with images at the same depth is a class, such as railway trains. In all other cases the only
    split is train.

    Args:
        names: Relative paths with `/`.
    """
    folders = [name.split("/")[:-1] for name in names]
    for level in range(max(map(len, folders), default=0)):
        if len({_split_of(parts[level]) for parts in folders if len(parts) > level} - {None}) > 1:
            return _divide(names, level)
    top = {parts[0] for parts in folders if parts}
    lone = top & SPLITS.keys()
    if not lone:
        return Layout({"train": list(names)})
    depths = {len(parts) for parts in folders if parts}
    if lone == {"train"} and len(top) > 1 and len(depths) == 1:
        return Layout({"train": list(names)})
    return _divide(names, 0)


def _split_of(folder: str) -> str | None:
    """Return the split of a folder by its name, such as train for Train or train2017; None for other names."""
    return SPLIT_OF.get(re.sub(r"[-_ ]?\d{4}$", "", folder.casefold()))


def _divide(names: Sequence[str], level: int) -> Layout:
    parts_of = {name: name.split("/")[:-1] for name in names}
    split_folders = {parts[level] for parts in parts_of.values() if len(parts) > level and _split_of(parts[level])}
    listed = " and ".join(f"{folder}/" for folder in sorted(split_folders))
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    unused_files = []
    for name, parts in parts_of.items():
        split = _split_of(parts[level]) if len(parts) > level else None
        if split is None:
            where = f"in {parts[0]}/, " if parts else ""
            unused_files.append(UnusedFile(name, f"{where}outside the split folders {listed}"))
        else:
            splits[split].append(name)
    return Layout({split: files for split, files in splits.items() if files}, unused_files, level)
