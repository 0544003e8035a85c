"""Remove local paths and hosts from values that are published.

A Hub id and a relative path look alike. `hub_ids` distinguishes them when a name is opened, and the result is stored in
`export.json`, in checkpoints and in `results.json`. Names that are not stored there are treated as paths.
"""

import os
import re
from collections.abc import Collection
from typing import Any
from urllib.parse import unquote, urlsplit

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# Keys of options and results whose values are not file names; they are not changed.
KEPT = ("hub_model_id", "hub_ids", "class_labels", "classes", "device", "hardware", "versions", "revision", "date")


def hub_ids(*names: str | None) -> list[str]:
    """Return the names that are Hub ids: of the form `namespace/name`, and not existing local paths."""
    return sorted({name for name in names if name and HUB_ID.fullmatch(name) and not os.path.exists(name)})


def strip_local_path(name: str, known_ids: Collection[str] = ()) -> str:
    """Return a name without local paths and hosts.

    Args:
        name: A name, a path, a Hub id or a URL.
        known_ids: Hub ids, as returned by `hub_ids`.

    Returns:
        A name in `known_ids` unchanged; otherwise only its last part, without folders, host, user, password, query and
        fragment.
    """
    if name in known_ids:
        return name
    last = name.split("::")[-1]  # fsspec chains URLs with "::", the outermost one last
    if "://" not in last:
        return _last_part(last) or last[:1]
    try:
        path = re.split("[?#]", unquote(urlsplit(last).path))[0]
    except ValueError:  # the host is invalid
        path = ""
    return _last_part(re.split("[;@]", path)[0]) or last.split("://")[0]


def public_values(value: Any, known_ids: Collection[str] = ()) -> Any:
    """Return options or results with `strip_local_path` applied to every text that contains a path or a URL."""
    if isinstance(value, dict):
        return {key: item if key in KEPT else public_values(item, known_ids) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(item, known_ids) for item in value]
    is_path = isinstance(value, str) and (
        value.startswith("~") or any(mark in value for mark in ("/", "\\", "::", "@"))
    )
    return strip_local_path(value, known_ids) if is_path else value


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part]
    return re.sub(r"^[^@]*@[^:]*:", "", parts[-1]) if parts else ""  # without user and host of scp's user@host:path
