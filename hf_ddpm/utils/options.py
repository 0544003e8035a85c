"""Options as dataclasses: declared with a line of help, read from the command line and from YAML, checked.

A file is turned into the same words that a command line is made of: one parser checks both.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_ddpm.utils.files import one_line


def option(help: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """Declares an option with its default and the line that `--help` prints."""
    return field(default=default, default_factory=factory, metadata={"help": help})


def require(config: Any, name: str, holds: bool, allowed: str) -> None:
    """Raises a `ValueError` unless a check of an option holds; the line says what is allowed."""
    require_value(name, getattr(config, name), holds, allowed)


def require_value(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raises a `ValueError` unless a check of a value holds; the line says what is allowed."""
    if not holds:
        raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def require_distinct(config: Any, *names: str) -> None:
    """Raises a `ValueError` unless options that are lists hold each value once."""
    for name in names:
        values = getattr(config, name)
        require(config, name, len(set(values)) == len(values), "each of them once")


def require_range(config: Any, name: str) -> None:
    """Raises a `ValueError` unless an option, if it is given, is a pair of finite numbers, the smaller one first."""
    values = getattr(config, name)
    holds = values is None or (len(values) == 2 and -math.inf < values[0] < values[1] < math.inf)
    require(config, name, holds, "two finite numbers LOW HIGH, LOW < HIGH")


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Raises a `ValueError` unless options, those of them that are given, are at least so much."""
    for name in names:
        require(config, name, getattr(config, name) is None or getattr(config, name) >= least, f"at least {least}")


def require_memory(config: Any, name: str, size: float) -> None:
    """Raises a `ValueError` unless bytes, of which an option is the cause, fit into the memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    allowed = f"it needs {size / 2**30:,.0f} GiB of memory, and this machine has {memory / 2**30:,.0f}"
    require(config, name, size <= memory, allowed)


def parse_options(argv: list[str], *parts: type, program: str | None = None) -> list[Any]:
    """Reads the options that some dataclasses declare.

    Args:
        argv: The command line without the program's name.
        parts: The dataclasses.
        program: What `--help` calls the program; its own name by default.

    Returns:
        An instance of each.

    Raises:
        ValueError: If an option is unknown or its value not allowed; one line.
    """
    parser = _Parser(parts, prog=program, allow_abbrev=False)
    *options, unknown = parser.parse_args_into_dataclasses(argv, **_ASKED_FOR)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}: {_hint(unknown[0].lstrip('-').split('=')[0], parts, '--')}")
    return options


def parse_command(argv: list[str], commands: Mapping[str, tuple[type, ...]]) -> tuple[str, list[Any]]:
    """Reads a sub-command and the options that its dataclasses declare.

    Args:
        argv: The command line without the program's name.
        commands: The dataclasses of each sub-command; `--help` says of it what the last of them says of itself.

    Returns:
        The name of the sub-command and an instance of each of its dataclasses.

    Raises:
        ValueError: If there is no sub-command, or as in `parse_options`; one line.
    """
    parser = _Parser((), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    lines = [f"  {name:22}{(parts[-1].__doc__ or '').splitlines()[0]}" for name, parts in commands.items()]
    parser.description = "\n".join(["Commands, each with options of its own (COMMAND --help):", *lines])
    parser.add_argument("command", choices=list(commands))
    name = parser.parse_args(argv[:1]).command
    return name, parse_options(argv[1:], *commands[name], program=f"{parser.prog} {name}")


def parse_first(argv: list[str], part: type) -> tuple[Any, list[str]]:
    """Reads the options that one dataclass declares; returns an instance of it and the words that are left."""
    parser = _Parser((part,), add_help=False, allow_abbrev=False)
    options, left = parser.parse_args_into_dataclasses(argv, **_ASKED_FOR)
    return options, left


def read_yaml(path: Any, parts: tuple[type, ...]) -> dict[str, list[str] | None]:
    """Reads options as the words of a command line.

    Args:
        path: The file.
        parts: The dataclasses that declare what may stand in it.

    Returns:
        The words that follow an option's name, by name; None stands for the default.

    Raises:
        ValueError: If the file cannot be read, or holds anything else; one line.
    """
    try:
        # The base loader leaves all values as they are written: `no` and `1e-4` are for the command line's parser.
        options = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {one_line(error)}") from error
    if not isinstance(options, dict):
        raise ValueError(f"config {str(path)!r} holds no options: lines of the form `name: value` are")
    kinds = {field.name: field.type for part in parts for field in dataclasses.fields(part)}
    words: dict[str, list[str] | None] = {}
    for name, value in options.items():
        if name not in kinds:
            raise ValueError(f"config {str(path)!r}: unknown option {name}: {_hint(name, parts)}")
        is_list = "list[" in str(kinds[name])  # which one value makes, too
        if isinstance(value, dict) or value == [] or (isinstance(value, list) and not is_list):
            what = "a list with an entry" if is_list else "one value"
            raise ValueError(f"config {str(path)!r}: {name}={value!r} is not allowed: {what}")
        words[name] = None if value in ("", "~", "null") else value if isinstance(value, list) else [value]
    return words


# No file beside the script, `train.args`, is read without being named.
_ASKED_FOR: Any = {"return_remaining_strings": True, "look_for_args_file": False}


class _Parser(HfArgumentParser):
    """Reports errors in one line, without the usage, and reads only usable values: see `_READERS`."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        kind = settings.get("type")
        if kind in _READERS and not (kind is str and settings.get("default") == ""):  # whose empty default means none
            settings["type"] = _READERS[kind]
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        # An option has an alias with dashes: one name will do.
        raise ValueError(re.sub(r"^(argument --\w+)/--[\w-]+", r"\1", message))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is too large: at most 63 bits")
    return value


def _filled(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a text with a character")
    return text


# How values are read, by the type of their option.
_READERS: dict[Any, Any] = {float: _finite, int: _whole, str: _filled}
# What argparse calls them in messages.
_finite.__name__, _whole.__name__ = "float", "int"


def _hint(name: str, parts: tuple[type, ...], prefix: str = "") -> str:
    known = [field.name for part in parts for field in dataclasses.fields(part)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"did you mean {prefix}{close[0]}?" if close else "see --help"
