"""Splits and classes of images, by folder."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from datasets import ClassLabel, Features

from hf_ddpm.data.scan import LeftOut, printable_name

# Names of the folders of a split, as in `datasets`.
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
        left_out: Files beside the folders of the splits.
        level: Which folder of a path is that of its split, from 0; None if there are no such folders.
    """

    splits: dict[str, list[str]]
    left_out: list[LeftOut] = field(default_factory=list)
    level: int | None = None

    def classes(self, outer: Callable[[str], int] = lambda name: 0) -> tuple[Features, dict[str, int]]:
        """Finds classes among the folders of files, without the first `outer(name)` ones and those of splits.

        Returns:
            The feature `label`, whose classes are the innermost folders, sorted, and the class of each file; both are
            empty unless all files are in equally many folders and there are at least two classes.
        """
        inner = {}
        for name in (name for names in self.splits.values() for name in names):
            folders = enumerate(name.split("/")[:-1])
            inner[name] = [folder for level, folder in folders if level >= outer(name) and level != self.level]
        names = sorted({folders[-1] for folders in inner.values() if folders})
        if len({len(folders) for folders in inner.values()}) != 1 or len(names) < 2:
            return Features(), {}
        numbers = {name: number for number, name in enumerate(names)}
        label = ClassLabel(names=[printable_name(name) for name in names])
        return Features(label=label), {name: numbers[folders[-1]] for name, folders in inner.items()}


def arrange(names: Sequence[str]) -> Layout:
    """Finds splits among the folders of files.

    Folders of two splits at one depth, such as train/ and val/, are splits wherever they are, and what is beside them
    is not used: held-out images never become training images. A lone train/, validation/ or test/ at the top is a split
    if no other folder there has images, and so is validation/ or test/ beside other folders. A train/ beside folders
    that hold images at the same depth is a class, such as that of railway trains. All else is one split, train.

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
    """Returns the split that a folder is named after, such as train for Train or train2017; None if it is not."""
    return SPLIT_OF.get(re.sub(r"[-_ ]?\d{4}$", "", folder.casefold()))


def _divide(names: Sequence[str], level: int) -> Layout:
    parts_of = {name: name.split("/")[:-1] for name in names}
    found = {parts[level] for parts in parts_of.values() if len(parts) > level and _split_of(parts[level])}
    beside = " and ".join(f"{folder}/" for folder in sorted(found))
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    left_out = []
    for name, parts in parts_of.items():
        split = _split_of(parts[level]) if len(parts) > level else None
        if split is None:
            where = f"in {parts[0]}/, " if parts else ""
            left_out.append(LeftOut(name, f"{where}beside the folders of splits {beside}"))
        else:
            splits[split].append(name)
    return Layout({split: files for split, files in splits.items() if files}, left_out, level)
