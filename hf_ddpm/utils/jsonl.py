"""JSON with finite numbers only, and append-only JSON Lines files; incomplete lines of a killed process are skipped."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_ddpm.utils.files import naming, write_text


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON.

    Raises:
        FloatingPointError: If a number is not finite, which JSON cannot represent.
    """
    for name, number in _not_finite(value, ""):
        raise FloatingPointError(f"{name} is {number}; expected a finite number")
    return json.dumps(value, indent=indent, allow_nan=False)


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry to a file, which is created if missing."""
    line = as_lines([entry]).encode()
    with naming(path), path.open("ab+") as file:
        is_torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            is_torn = file.read() != b"\n"
        file.write((b"\n" if is_torn else b"") + line)


def as_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """Return entries as the text of a JSON Lines file."""
    return "".join(to_json(entry) + "\n" for entry in entries)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file, or an empty list if it is missing; lines that are not JSON objects are skipped."""
    entries = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # bytes that are not UTF-8 also raise a ValueError
            continue
        if isinstance(entry, dict) and not any(_not_finite(entry, "")):
            entries.append(entry)
    return entries


def cut_lines(path: Path, step: int) -> None:
    """Remove the entries of a file whose step is later than `step` or missing."""
    if path.exists():
        kept = [entry for entry in read_lines(path) if isinstance(entry.get("step"), int) and entry["step"] <= step]
        write_text(path, as_lines(kept))


def _not_finite(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers in a value that are not finite, each with its path, such as `fd.value` or `terms[3]`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{name}[{index}]")
