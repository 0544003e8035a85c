"""Folders of array files as data sets."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, NamedSplit

from hf_ddpm.data.arrays import SUFFIXES, is_stack, open_stack


def load_arrays(splits: dict[str, Path]) -> DatasetDict:
    """Makes a data set of array files: an image per file, or all images of a file of 4 dimensions.

    Args:
        splits: A folder, or a file, for each split. Where all files are in folders below, equally deep and of several
            names, these are classes.

    Returns:
        The splits that have files, with the columns `image` and, if there are classes, `label`.

    Raises:
        FileNotFoundError: If there are no files.
    """
    splits = {split: root.absolute() for split, root in splits.items()}
    files = {split: array_files(root) for split, root in splits.items()}
    below = [path.relative_to(splits[split]) for split, paths in files.items() for path in paths]
    if not below:
        raise FileNotFoundError("no array files")
    folders, depths = {path.parent.name for path in below}, {len(path.parts) for path in below}
    features = {"image": Image()}
    if len(folders) > 1 and len(depths) == 1:
        features["label"] = ClassLabel(names=sorted(folders))
    made = {}
    for split, paths in files.items():
        # The hash of these arguments is that of the data set: a file that changes makes another one.
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        options = {"files": stamps, "has_labels": "label" in features}
        if paths:
            made[split] = Dataset.from_generator(_rows, Features(features), gen_kwargs=options, split=NamedSplit(split))
    return DatasetDict(made)


def array_files(root: Path) -> list[Path]:
    """Returns the array files of a folder, links followed, hidden ones aside; or the file itself."""
    if root.is_file():
        return [root]
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        is_new = os.path.realpath(folder) not in seen  # a link may lead back up
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if is_new and not name.startswith(".")]
        found += [Path(folder) / name for name in names if is_new and not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def _rows(files: Sequence[tuple[str, int, int]], has_labels: bool) -> Iterator[dict[str, Any]]:
    for name, *_ in files:
        path = Path(name)
        label = {"label": path.parent.name} if has_labels else {}
        if not is_stack(path):
            yield {"image": {"bytes": None, "path": name}, **label}
            continue
        for number, image in enumerate(open_stack(path)):
            file = io.BytesIO()
            np.save(file, image, allow_pickle=False)
            yield {"image": {"bytes": file.getvalue(), "path": f"{name}[{number}]"}, **label}
