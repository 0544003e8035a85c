"""Folders of array files as data sets."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, NamedSplit

from hf_ddpm.data.arrays import is_stack, open_stack
from hf_ddpm.data.caching import load_sound
from hf_ddpm.data.folders import Opened
from hf_ddpm.data.layout import arrange, class_names
from hf_ddpm.data.scan import LeftOut, Stamp, printable, printable_name


def open_arrays(
    root: Path, files: Mapping[str, Stamp], left_out: Sequence[LeftOut], log: Callable[[str], object]
) -> Opened:
    """Opens array files: an image per file, or all images of a file of 4 dimensions.

    Args:
        root: The folder.
        files: The array files below it, by their relative path; splits and classes are those of folders of images.
        left_out: Files that are not used.
        log: Called with a line for each damaged cache.

    Returns:
        The splits: `image`, and `label` where folders are classes.
    """
    layout = arrange(list(files))
    labels = class_names(layout.folders(name) for names in layout.splits.values() for name in names)
    features = {"image": Image()}
    if labels is not None:
        features["label"] = ClassLabel(names=[printable_name(name) for name in labels])

    def rows(names: Sequence[str]) -> list[tuple[str, int, int, int | None]]:
        numbers = {name: None if labels is None else labels.index(layout.folders(name)[-1]) for name in names}
        return [(str(root.absolute() / name), files[name].size, files[name].changed, numbers[name]) for name in names]

    def make() -> DatasetDict:
        # The hash of the arguments is that of the data set: a file that changes makes another one.
        return DatasetDict({
            split: Dataset.from_generator(
                _rows, Features(features), gen_kwargs={"files": rows(names)}, split=NamedSplit(split)
            )
            for split, names in layout.splits.items()
        })  # fmt: skip

    return Opened(load_sound(make, log), [*left_out, *layout.left_out])


def _rows(files: Sequence[tuple[str, int, int, int | None]]) -> Iterator[dict[str, Any]]:
    for file, _, _, number in files:
        path, name = Path(file), printable(file)
        label = {} if number is None else {"label": number}
        if not is_stack(path):
            yield {"image": {"bytes": None, "path": name}, **label}
            continue
        for place, image in enumerate(open_stack(path)):
            content = io.BytesIO()
            np.save(content, image, allow_pickle=False)
            yield {"image": {"bytes": content.getvalue(), "path": f"{name}[{place}]"}, **label}
