"""Foreign text (names of classes, data sets and models) in Markdown, as text and nothing else."""

import re

# What Markdown (with tables, mathematics and links) and HTML give a meaning to. An underscore within a word has none.
SPECIAL = re.compile(r"[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
BREAKS = re.compile("[\\s\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")  # controls, too, and changes of direction


def plain(text: object) -> str:
    """Returns a text in one line, without control characters."""
    return BREAKS.sub(" ", str(text)).strip()


def escape(text: object) -> str:
    """Returns Markdown, for a line or a table's cell, that shows a text as it is."""
    return SPECIAL.sub(r"\\\g<0>", plain(text))


def code(text: object) -> str:
    """Returns Markdown that shows a text as code, or as it is if code cannot hold it."""
    line = plain(text)
    return f"`{line}`" if line and not re.search(r"[`|]", line) else escape(line)
