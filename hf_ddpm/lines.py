"""Files of JSON, an entry a line, that runs append to: what a kill has cut short is no line."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_ddpm.files import write_text


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds an entry to a file, which need not be there."""
    with path.open("ab+") as file:
        is_torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            is_torn = file.read() != b"\n"
        file.write((b"\n" if is_torn else b"") + as_lines([entry]).encode())


def as_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """Returns the text of a file of these entries."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a file, none if it is not there."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        entries += [entry] if isinstance(entry, dict) else []
    return entries


def cut_lines(path: Path, step: int) -> None:
    """Drops the entries of a file that are of later steps than `step`, or of none."""
    if path.exists():
        kept = [entry for entry in read_lines(path) if isinstance(entry.get("step"), int) and entry["step"] <= step]
        write_text(path, as_lines(kept))
