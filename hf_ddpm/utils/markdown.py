"""Escape text for Markdown: names of classes, datasets and models."""

import re

# Special characters of Markdown (with tables, mathematics and links) and HTML. An underscore within a word is not.
SPECIAL = re.compile(r"[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
# Whitespace, control characters and changes of writing direction.
BREAKS = re.compile("[\\s\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")


def plain(text: object) -> str:
    """Return text in one line, without control characters."""
    return BREAKS.sub(" ", str(text)).strip()


def escape(text: object) -> str:
    """Return Markdown, for a line or a table cell, that shows text unchanged."""
    return SPECIAL.sub(r"\\\g<0>", plain(text))


def code(text: object) -> str:
    """Return Markdown that shows text as code, or as plain text if it contains ` or |."""
    line = plain(text)
    return f"`{line}`" if line and not re.search(r"[`|]", line) else escape(line)
