"""Names that may leave this machine: Hub ids, and the last part of paths and URLs.

Only where a name is opened can a Hub id be told from a relative path. There `hub_ids` decides, and the run keeps the
answer: in `export.json`, in its checkpoints, and in the figures of `results.json`. Without an answer a name is a path.
"""

import os
import re
from collections.abc import Collection
from typing import Any
from urllib.parse import unquote, urlsplit

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# Keys of options and results whose values are no names of files: they stay as they are.
KEPT = ("hub_model_id", "hub_ids", "class_labels", "classes", "device", "hardware", "versions", "revision", "date")


def hub_ids(*names: str | None) -> list[str]:
    """Returns those of the names that are Hub ids, `namespace/name`, and no paths seen from here."""
    return sorted({name for name in names if name and HUB_ID.fullmatch(name) and not os.path.exists(name)})


def strip_local_path(name: str, known: Collection[str] = ()) -> str:
    """Returns a name as others may read it.

    Args:
        name: A name, a path, a Hub id or a URL.
        known: Hub ids, as `hub_ids` found them.

    Returns:
        A known Hub id as it is, else the last part alone: without folders, host, user, password, query and fragment.
    """
    if name in known:
        return name
    last = name.split("::")[-1]  # fsspec chains URLs, the outermost one last
    if "://" not in last:
        return _last_part(last) or last[:1]
    try:
        path = re.split("[?#]", unquote(urlsplit(last).path))[0]
    except ValueError:  # a host that is none
        path = ""
    return _last_part(re.split("[;@]", path)[0]) or last.split("://")[0]


def public_values(value: Any, known: Collection[str] = ()) -> Any:
    """Returns options or results, in which every text that holds a path or a URL is a `strip_local_path`."""
    if isinstance(value, dict):
        return {key: item if key in KEPT else public_values(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(item, known) for item in value]
    is_path = isinstance(value, str) and (
        value.startswith("~") or any(mark in value for mark in ("/", "\\", "::", "@"))
    )
    return strip_local_path(value, known) if is_path else value


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part]
    return re.sub(r"^[^@]*@[^:]*:", "", parts[-1]) if parts else ""  # without user and host, as scp has them
