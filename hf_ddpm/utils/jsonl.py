"""Finite JSON, and files of JSON lines that runs append to; lines that a kill cut short are skipped."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_ddpm.utils.files import naming, write_text


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON.

    Raises:
        FloatingPointError: If a number is not finite: JSON has no such number, and no figure is one.
    """
    for name, number in _not_finite(value, ""):
        raise FloatingPointError(f"{name} is {number}: only finite numbers are written")
    return json.dumps(value, indent=indent, allow_nan=False)


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Appends an entry to a file, which is created if it is missing."""
    line = as_lines([entry]).encode()
    with naming(path), path.open("ab+") as file:
        is_torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            is_torn = file.read() != b"\n"
        file.write((b"\n" if is_torn else b"") + line)


def as_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """Returns the text of a file of these entries."""
    return "".join(to_json(entry) + "\n" for entry in entries)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a file, an empty list if it is missing; lines that are not JSON objects are skipped."""
    entries = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # bytes that are not UTF-8 are a ValueError, too
            continue
        if isinstance(entry, dict) and not any(_not_finite(entry, "")):
            entries.append(entry)
    return entries


def cut_lines(path: Path, step: int) -> None:
    """Drops the entries of a file that are of later steps than `step`, or of none."""
    if path.exists():
        kept = [entry for entry in read_lines(path) if isinstance(entry.get("step"), int) and entry["step"] <= step]
        write_text(path, as_lines(kept))


def _not_finite(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yields the numbers in a value that are not finite, each with its place, such as `fd.value` or `terms[3]`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{name}[{index}]")
