"""Decode all images of a dataset once, into a cached table of raw CHW pixels."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from datasets.fingerprint import Hasher

from hf_ddpm.data.caching import cache_folder, explain_full_disk, read_decoded
from hf_ddpm.data.transforms import ImageFormat, fit
from hf_ddpm.utils.files import count_of, one_line, write_text
from hf_ddpm.utils.jsonl import as_lines, read_lines
from hf_ddpm.utils.launch import own_cores

# Part of the cache key, which does not depend on the code below: increase it when decoded pixels change.
RECIPE = 3

ROWS = 256
DECODED = Features(
    {
        "pixels": Value("binary"),
        "height": Value("int32"),
        "width": Value("int32"),
        "reason": Value("string"),
        "note": Value("string"),
    }
)


@dataclass(frozen=True)
class BadImage:
    """An unusable image.

    Attributes:
        file: The image file, or the file with its row; None if unknown.
        row: The row in that file or in the dataset; None if it has none.
        reason: Why it is unusable.
    """

    file: str | None
    row: int | None
    reason: str

    def text(self, column: str) -> str:
        """Return the location of the image and the reason."""
        return f"row {self.row} ({self.file or f'column {column!r}'}): {self.reason}"

    def error(self, column: str) -> ValueError:
        """Return the error for the image, with the options that avoid it."""
        larger = (
            "--enlarge true to upscale small images, or " if "is smaller than the resolution" in self.reason else ""
        )
        return ValueError(f"{self.text(column)}; use {larger}--skip_bad_images true to skip unusable images")


def decode(
    dataset: Dataset,
    column: str,
    image_format: ImageFormat,
    rows: Sequence[int],
    *,
    skip_bad_images: bool = False,
    log: Callable[[str], object] = lambda line: None,
) -> tuple[Dataset, Sequence[int], list[BadImage]]:
    """Decode all images of a split into raw pixels; a second call with the same arguments reads the cache.

    Args:
        dataset: An opened split, or a part of one.
        column: The image column.
        image_format: Format of the decoded images.
        rows: The row numbers of `dataset` in the split, for messages about bad images.
        skip_bad_images: If true, skip unusable images.
        log: Called with a line if the cache was damaged, and with lines about lost information, such as bit depth.

    Returns:
        A dataset in the same order with `pixels`, the bytes of CHW arrays of `image_format.dtype`, and their `height`
        and `width`; the indices of its images in `dataset`; and the skipped images.

    Raises:
        ValueError: If an image is unusable, or with `skip_bad_images` if all are; the message names row, file and
            reason.
    """
    encoded = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    options = {"column": column, "form": asdict(image_format), "skip": skip_bad_images, "recipe": RECIPE}
    key = _cache_key(encoded, options)
    file = cache_folder() / "hf_ddpm" / f"cache-{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    decoded = read_decoded(file, len(encoded), log)
    if decoded is None:
        with explain_full_disk():
            decoded = encoded.map(
                _decode_rows,
                with_indices=True,
                batched=True,
                batch_size=ROWS,
                fn_kwargs={"image_format": image_format, "strict_rows": None if skip_bad_images else rows},
                remove_columns=encoded.column_names,
                features=DECODED,
                cache_file_name=str(file),
                new_fingerprint=key,
                desc="Decoding images",
            )
    for note, count in Counter(decoded.select_columns(["note"])["note"]).items():
        if note is not None:
            log(f"{note}: {count_of(count, 'image')}")
    reasons = decoded.select_columns(["reason"]).with_format("arrow")[:]["reason"]
    if reasons.null_count == len(reasons):
        return decoded, range(len(reasons)), []
    reasons = reasons.to_pylist()
    usable = [index for index, reason in enumerate(reasons) if reason is None]
    bad = [BadImage(_path(encoded[i][column]), rows[i], reason) for i, reason in enumerate(reasons) if reason]
    if not usable:
        raise ValueError(f"all images are unusable ({len(bad):,}), the first one in {bad[0].text(column)}")
    return decoded.select(usable), usable, bad


def attempt(row: dict[str, Any] | None, image_format: ImageFormat, notes: list[str] | None = None) -> np.ndarray | str:
    """Return the decoded image, or the reason why it is unusable in one line."""
    try:
        return fit(row, image_format, notes)
    except Exception as error:  # decoders raise many types
        return one_line(error) or type(error).__name__


def write_report(bad: Sequence[BadImage], path: Path) -> None:
    """Write skipped images as JSON Lines, atomically."""
    write_text(path, as_lines(map(asdict, bad)))


def read_report(path: Path) -> set[tuple[Any, Any]]:
    """Return the file and row of each image in a report; an empty set if the report does not exist."""
    return {(image.get("file"), image.get("row")) for image in read_lines(path)}


def _decode_rows(
    batch: dict[str, list[Any]], indices: list[int], image_format: ImageFormat, strict_rows: Sequence[int] | None
) -> dict[str, list[Any]]:
    """Decode encoded images; raise an error for a bad image if `strict_rows`, the row numbers, is given."""
    ((column, encoded),), cores = batch.items(), own_cores()
    notes: list[list[str]] = [[] for _ in encoded]
    # Each thread gets many images at once: for small images, one task per image would be slower.
    share = -(-len(encoded) // cores)
    parts = [range(start, min(start + share, len(encoded))) for start in range(0, len(encoded), share)]
    with ThreadPoolExecutor(cores) as pool:
        done = pool.map(lambda part: [attempt(encoded[i], image_format, notes[i]) for i in part], parts)
        images = [image for part in done for image in part]
    columns: dict[str, list[Any]] = {name: [] for name in DECODED}
    for index, row, image, note in zip(indices, encoded, images, notes, strict=True):
        if isinstance(image, str):
            if strict_rows is not None:
                raise BadImage(_path(row), strict_rows[index], image).error(column)
            values: tuple[Any, ...] = (None, None, None, image, None)
        else:
            values = (image.tobytes(), *image.shape[1:], None, ", ".join(note) or None)
        for name, value in zip(DECODED, values, strict=True):
            columns[name].append(value)
    return columns


def _cache_key(encoded: Dataset, options: dict[str, Any]) -> str:
    """Return the hash of everything that decoded images depend on: the dataset, its files, and the options."""
    files = [Path(file["filename"]) for file in encoded.cache_files]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Hasher.hash([encoded._fingerprint, stamps, options])


def _path(row: dict[str, Any] | None) -> str | None:
    return (row or {}).get("path")
