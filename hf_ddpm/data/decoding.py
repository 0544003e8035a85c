"""Files to pixels, once: every image is decoded, fitted and kept as the raw bytes of a CHW array in a cached table."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, Value

from hf_ddpm.data.fitting import ImageFormat, fit
from hf_ddpm.files import one_line, write_text
from hf_ddpm.launch import own_cores
from hf_ddpm.lines import as_lines, read_lines

# Part of the cache's key, which does not see the functions below: raised when they change what they return.
RECIPE = 2

ROWS = 256
DECODED = Features(
    {"pixels": Value("binary"), "height": Value("int32"), "width": Value("int32"), "reason": Value("string")}
)


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used.

    Attributes:
        file: Where it is: its own file, or the one that holds its row; None if unknown.
        row: Its row there, or in the data set.
        reason: What is wrong with it.
    """

    file: str | None
    row: int
    reason: str

    def text(self, column: str) -> str:
        """Returns what is wrong with it, and where it is."""
        return f"image in row {self.row} ({self.file or f'column {column!r}'}) is not usable: {self.reason}"

    def refusal(self, column: str) -> "UnusableImage":
        """Returns the error that names it."""
        error = UnusableImage(f"{self.text(column)} (skip_bad_images leaves such images out)")
        error.image = self
        return error


class UnusableImage(ValueError):
    """An image cannot be used, and is not to be left out.

    Attributes:
        image: Which.
    """

    image: BadImage


def decode(
    dataset: Dataset, column: str, form: ImageFormat, *, skip_bad_images: bool = False
) -> tuple[Dataset, list[BadImage]]:
    """Decodes all images of a split into raw bytes; a second call with the same arguments reads the cache.

    Args:
        dataset: An opened split.
        column: Its column of images.
        form: What images are made into.
        skip_bad_images: Whether images that cannot be used are left out.

    Returns:
        A data set, in order, of `pixels`, the bytes of CHW arrays of `form.dtype`, and their `height` and `width`; and
        the images that it leaves out.

    Raises:
        ValueError: If an image cannot be used, or with `skip_bad_images` none can; row, file and reason are named.
    """
    encoded = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    decoded = encoded.map(
        _decode_rows,
        with_indices=True,
        batched=True,
        batch_size=ROWS,
        fn_kwargs={"column": column, "form": asdict(form), "skip": skip_bad_images, "recipe": RECIPE},
        remove_columns=encoded.column_names,
        features=DECODED,
        desc="Decoding images",
    )
    reasons = decoded.select_columns(["reason"]).with_format("arrow")[:]["reason"]
    if reasons.null_count == len(reasons):
        return decoded, []
    bad = [BadImage(_path(encoded[row][column]), row, reasons[row].as_py()) for row in _rows(reasons.is_valid())]
    if len(bad) == len(decoded):
        raise ValueError(f"none of the {len(bad)} images is usable: {bad[0].text(column)}")
    return decoded.select(_rows(reasons.is_null())), bad


def attempt(row: dict[str, Any] | None, form: ImageFormat) -> np.ndarray | str:
    """Returns an image, fitted, or what is wrong with it, in one line."""
    try:
        return fit(row, form)
    except Exception as error:  # decoders raise anything
        return one_line(error) or type(error).__name__


def write_report(bad: Sequence[BadImage], path: Path) -> None:
    """Writes the images that were left out, one JSON object a line, so that no reader sees half of it."""
    write_text(path, as_lines(map(asdict, bad)))


def read_report(path: Path) -> set[tuple[Any, Any]]:
    """Returns file and row of each image that a report lists; none if it is not there."""
    return {(image.get("file"), image.get("row")) for image in read_lines(path)}


def _decode_rows(
    rows: dict[str, list[Any]], indices: list[int], column: str, form: dict[str, Any], skip: bool, recipe: int
) -> dict[str, list[Any]]:
    target, encoded, cores = ImageFormat(**form), rows[column], own_cores()
    # A thread takes many at a time: with small images, handing them over one by one would cost more than it gains.
    share = -(-len(encoded) // cores)
    parts = [encoded[start : start + share] for start in range(0, len(encoded), share)]
    with ThreadPoolExecutor(cores) as pool:
        images = [i for part in pool.map(lambda part: [attempt(row, target) for row in part], parts) for i in part]
    columns: dict[str, list[Any]] = {name: [] for name in DECODED}
    for index, row, image in zip(indices, encoded, images, strict=True):
        if isinstance(image, str):
            if not skip:
                raise BadImage(_path(row), index, image).refusal(column)
            values: tuple[Any, ...] = (None, None, None, image)
        else:
            values = (image.tobytes(), *image.shape[1:], None)
        for name, value in zip(DECODED, values, strict=True):
            columns[name].append(value)
    return columns


def _path(row: dict[str, Any] | None) -> str | None:
    return (row or {}).get("path")


def _rows(mask: pa.ChunkedArray) -> list[int]:
    return np.flatnonzero(mask.to_numpy()).tolist()
