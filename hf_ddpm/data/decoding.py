"""Files to pixels, once: every image is decoded, fitted and kept as the raw bytes of a CHW array in a cached table."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from datasets.fingerprint import Hasher

from hf_ddpm.data.caching import cache_folder, full_disk_named, read_decoded
from hf_ddpm.data.transforms import ImageFormat, fit
from hf_ddpm.utils.files import one_line, write_text
from hf_ddpm.utils.jsonl import as_lines, read_lines
from hf_ddpm.utils.launch import own_cores

# Part of the cache's key, which does not see the functions below: raised when they change what they return.
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
    """An image that cannot be used.

    Attributes:
        file: Its own file, or the one that holds its row; None if unknown.
        row: Its row there, or in the data set; None if it is in neither.
        reason: What is wrong with it.
    """

    file: str | None
    row: int | None
    reason: str

    def text(self, column: str) -> str:
        """Returns its place and what is wrong with it."""
        return f"image in row {self.row} ({self.file or f'column {column!r}'}) is not usable: {self.reason}"

    def refusal(self, column: str) -> ValueError:
        """Returns the error that names it."""
        larger = "--enlarge true scales small images up, " if "is smaller than resolution" in self.reason else ""
        return ValueError(f"{self.text(column)} ({larger}--skip_bad_images true leaves such images out)")


def decode(
    dataset: Dataset,
    column: str,
    image_format: ImageFormat,
    rows: Sequence[int],
    *,
    skip_bad_images: bool = False,
    log: Callable[[str], object] = lambda line: None,
) -> tuple[Dataset, Sequence[int], list[BadImage]]:
    """Decodes all images of a split into raw bytes; a second call with the same arguments reads the cache.

    Args:
        dataset: An opened split, or a part of one.
        column: Its column of images.
        image_format: Format of the decoded images.
        rows: The rows of the split that it consists of, by which bad images are named.
        skip_bad_images: Whether images that cannot be used are left out.
        log: Called with a line if the cache was damaged, and with one on what is lost of images.

    Returns:
        A data set, in order, of `pixels`, the bytes of CHW arrays of `image_format.dtype`, and their `height` and
        `width`; the places in `dataset` of its images; and the images that it leaves out.

    Raises:
        ValueError: If an image cannot be used, or with `skip_bad_images` none can; row, file and reason are named.
    """
    encoded = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    options = {"column": column, "form": asdict(image_format), "skip": skip_bad_images, "recipe": RECIPE}
    key = _cache_key(encoded, options)
    file = cache_folder() / "hf_ddpm" / f"cache-{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    decoded = read_decoded(file, len(encoded), log)
    if decoded is None:
        with full_disk_named():
            decoded = encoded.map(
                _decode_rows,
                with_indices=True,
                batched=True,
                batch_size=ROWS,
                fn_kwargs={"image_format": image_format, "refused_at": None if skip_bad_images else rows},
                remove_columns=encoded.column_names,
                features=DECODED,
                cache_file_name=str(file),
                new_fingerprint=key,
                desc="Decoding images",
            )
    for note, count in Counter(decoded.select_columns(["note"])["note"]).items():
        if note is not None:
            log(f"{note}: {count:,} images")
    reasons = decoded.select_columns(["reason"]).with_format("arrow")[:]["reason"]
    if reasons.null_count == len(reasons):
        return decoded, range(len(reasons)), []
    reasons = reasons.to_pylist()
    usable = [place for place, reason in enumerate(reasons) if reason is None]
    bad = [BadImage(_path(encoded[i][column]), rows[i], reason) for i, reason in enumerate(reasons) if reason]
    if not usable:
        raise ValueError(f"none of the {len(bad)} images is usable: {bad[0].text(column)}")
    return decoded.select(usable), usable, bad


def attempt(row: dict[str, Any] | None, image_format: ImageFormat, notes: list[str] | None = None) -> np.ndarray | str:
    """Returns an image, fitted, or what is wrong with it, in one line."""
    try:
        return fit(row, image_format, notes)
    except Exception as error:  # decoders raise anything
        return one_line(error) or type(error).__name__


def write_report(bad: Sequence[BadImage], path: Path) -> None:
    """Writes the images that were left out, one JSON object a line, so that no reader sees half of it."""
    write_text(path, as_lines(map(asdict, bad)))


def read_report(path: Path) -> set[tuple[Any, Any]]:
    """Returns file and row of each image that a report lists; none if it is not there."""
    return {(image.get("file"), image.get("row")) for image in read_lines(path)}


def _decode_rows(
    batch: dict[str, list[Any]], places: list[int], image_format: ImageFormat, refused_at: Sequence[int] | None
) -> dict[str, list[Any]]:
    """Decodes encoded images; if `refused_at`, the rows of all images, is given, it refuses bad ones."""
    ((column, encoded),), cores = batch.items(), own_cores()
    notes: list[list[str]] = [[] for _ in encoded]
    # A thread takes many at a time: with small images, handing them over one by one would cost more than it gains.
    share = -(-len(encoded) // cores)
    parts = [range(start, min(start + share, len(encoded))) for start in range(0, len(encoded), share)]
    with ThreadPoolExecutor(cores) as pool:
        done = pool.map(lambda part: [attempt(encoded[i], image_format, notes[i]) for i in part], parts)
        images = [image for part in done for image in part]
    columns: dict[str, list[Any]] = {name: [] for name in DECODED}
    for place, row, image, note in zip(places, encoded, images, notes, strict=True):
        if isinstance(image, str):
            if refused_at is not None:
                raise BadImage(_path(row), refused_at[place], image).refusal(column)
            values: tuple[Any, ...] = (None, None, None, image, None)
        else:
            values = (image.tobytes(), *image.shape[1:], None, ", ".join(note) or None)
        for name, value in zip(DECODED, values, strict=True):
            columns[name].append(value)
    return columns


def _cache_key(encoded: Dataset, options: dict[str, Any]) -> str:
    """Returns what decoded images depend on: the data set, the files that it is kept in, and how it is decoded."""
    files = [Path(file["filename"]) for file in encoded.cache_files]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Hasher.hash([encoded._fingerprint, stamps, options])


def _path(row: dict[str, Any] | None) -> str | None:
    return (row or {}).get("path")
