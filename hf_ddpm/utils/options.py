"""Options declared as dataclasses, read from the command line and from YAML, and checked.

A YAML file is converted to command-line arguments, so that one parser checks both.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.migration import MIGRATION
from hf_ddpm.utils.schema import check_types


class Auto(int):
    """The value of an option set to `auto`: an initial number, given before `auto` or the default."""


yaml.SafeDumper.add_representer(Auto, yaml.SafeDumper.represent_int)


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    factory: Any = dataclasses.MISSING,
    flag: str | None = None,
    is_first: bool = False,
    auto: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare an option.

    Args:
        help: The description in `--help`.
        default: The default; without a default the option is required.
        factory: Function that returns the default.
        flag: The name on the command line, if it differs from the field's.
        is_first: If true, the first argument of the command line may be the value, without the option's name.
        auto: If true, the value may also be the word `auto`, for an integer option.
        metavar: The placeholder of the value in `--help`; by default from the type.
    """
    more: dict[str, Any] = {} if flag is None else {"flag": flag}
    more |= {"is_first": True} if is_first else {}
    more |= {} if metavar is None else {"metavar": metavar}
    return field(default=default, default_factory=factory, metadata={"help": help, "auto": auto, **more})


def require(config: Any, name: str, holds: bool, allowed: str) -> None:
    """Raise a `ValueError` with an option, its value and the valid values unless `holds`; see `require_value`."""
    require_value(name, getattr(config, name), holds, allowed)


def require_types(config: Any) -> None:
    """Raise a `ValueError` unless all options have the types of their fields; paths are converted to text.

    This checks options given in Python; the parser already converts options of the command line and of YAML files.
    """
    for entry in dataclasses.fields(config):
        if isinstance(getattr(config, entry.name), os.PathLike):
            setattr(config, entry.name, os.fspath(getattr(config, entry.name)))
    hints = get_type_hints(type(config))
    check_types(vars(config), {entry.name: hints[entry.name] for entry in dataclasses.fields(config)})


def require_value(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raise a `ValueError` such as "--eta 2.0: expected a number in [0, 1]" unless `holds`.

    Args:
        name: Name of the option, without dashes.
        value: Value of the option.
        holds: If false, the error is raised.
        allowed: The valid values, such as "at least 1"; or a reason and the valid values, "REASON; expected VALUES".
    """
    if not holds:
        given = f"--{name} {'' if value is None else _typed(value)}".rstrip()
        raise ValueError(f"{given}: {allowed if 'expected' in allowed else f'expected {allowed}'}")


def require_distinct(config: Any, *names: str) -> None:
    """Raise a `ValueError` if a list option contains a value twice."""
    for name in names:
        values = getattr(config, name)
        require(config, name, len(set(values)) == len(values), "each value only once")


def require_range(config: Any, name: str) -> None:
    """Raise a `ValueError` unless an option, if given, is a pair of finite numbers, the smaller one first."""
    values = getattr(config, name)
    holds = values is None or (len(values) == 2 and -math.inf < values[0] < values[1] < math.inf)
    require(config, name, holds, "two finite numbers LOW HIGH, LOW < HIGH")


def require_color(config: Any, name: str) -> None:
    """Raise a `ValueError` unless an option, if given, is an opaque color that PIL can parse."""
    value = getattr(config, name)
    holds = value is None or value == "white" or _is_opaque_color(value)
    require(config, name, holds, "an opaque color such as white, #336699 or rgb(51, 102, 153)")


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Raise a `ValueError` unless each of the given options is at least `least`."""
    for name in names:
        require(config, name, getattr(config, name) is None or getattr(config, name) >= least, f"at least {least}")


def require_memory(config: Any, name: str, size: float) -> None:
    """Raise a `ValueError` if an option needs more bytes than the memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    needed, existing = f"{size / 2**30:,.0f} GiB", f"{memory / 2**30:,.0f} GiB"
    require(config, name, size <= memory, f"needs {needed} of memory; expected at most the {existing} of this machine")


def parse_options(argv: list[str], *parts: type, program: str | None = None, doc: str | None = None) -> list[Any]:
    """Parse the options of dataclasses from a command line.

    Args:
        argv: The command line without the program's name.
        parts: The dataclasses; each is a group in `--help`.
        program: Name of the program in `--help`; by default the name of the running program.
        doc: Text of `--help`: its first paragraph is printed before the options, the rest after them.

    Returns:
        An instance of each dataclass.

    Raises:
        ValueError: If an option is unknown or its value is invalid; one line.
    """
    arguments, names = _normalized(argv, parts), option_names(parts)
    unknown = [name for word in arguments if (name := _option_name(word)) and name not in (*names, "help")]
    if unknown and not {"-h", "--help"} & set(argv):  # first, as a missing option may just be misspelled
        hints = [f"--{name}: {_hint(name, names, '--')}" for name in dict.fromkeys(unknown)]
        raise ValueError(f"unknown option{'s' * (len(hints) > 1)} {'; '.join(hints)}")
    values, rest = _parser(parts, program, doc).parse_known_args(arguments)
    if rest:
        before = arguments[: arguments.index(rest[0])][-1:]
        place = f" after {before[0]}" if before else ""
        raise ValueError(f"unexpected argument {rest[0]!r}{place}: expected --OPTION VALUE; see --help")
    return _instances(parts, values)


def parse_command(
    argv: list[str], commands: Mapping[str, tuple[type, ...]], doc: str | None = None
) -> tuple[str, list[Any]]:
    """Parse a sub-command and its options from a command line.

    Args:
        argv: The command line without the program's name.
        commands: The dataclasses of each sub-command. The first docstring line of the last one describes the
            sub-command in `--help`.
        doc: Text of `--help`, see `parse_options`.

    Returns:
        The name of the sub-command and an instance of each of its dataclasses.

    Raises:
        ValueError: If the sub-command or an option is unknown, or a value is invalid; one line.
    """
    lines = {name: _first_line(parts[-1]) for name, parts in commands.items()}
    program = Path(sys.argv[0]).name
    if not argv:
        raise ValueError(f"command is missing; expected one of {', '.join(commands)}; see --help")
    if argv[0] in ("-h", "--help"):
        summary, _, rest = (doc or "").strip("\n").partition("\n\n")
        listed = "\n".join(f"  {name:22}{line}" for name, line in lines.items())
        print(f"usage: {program} COMMAND [--OPTION VALUE ...]\n\n{summary}\n")
        print(f"commands (see COMMAND --help for the options of each):\n{listed}\n\nexamples:\n\n{rest}")
        raise SystemExit(0)
    name = require_name("command", argv[0], commands)
    return name, parse_options(argv[1:], *commands[name], program=f"{program} {name}", doc=lines[name])


def require_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return a name; raise a `ValueError` with the most similar name, or all names, if it is not in `valid`."""
    if name not in valid:
        close = difflib.get_close_matches(name, valid, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(valid)}"
        raise ValueError(f"unknown {kind} {name!r}: {hint}")
    return name


def parse_first(argv: list[str], part: type) -> tuple[Any, list[str]]:
    """Parse the options of one dataclass; return an instance of it and the remaining arguments."""
    values, rest = _parser((part,), add_help=False).parse_known_args(_normalized(argv, (part,)))
    return _instances((part,), values)[0], rest


def option_names(parts: Iterable[type]) -> list[str]:
    """Return the command-line names of the options of dataclasses, without the dashes."""
    return [_flag(field) for part in parts for field in dataclasses.fields(part)]


def given_options(argv: Iterable[str], parts: Iterable[type]) -> set[str]:
    """Return the names of the options in a command line."""
    return {name for word in _normalized(argv, parts) if (name := _option_name(word))}


def read_yaml(path: Any, parts: tuple[type, ...]) -> dict[str, list[str] | None]:
    """Read options from a YAML file as command-line arguments.

    Args:
        path: The file.
        parts: The dataclasses whose options the file may contain.

    Returns:
        The values of each option as command-line arguments, by name; None stands for the default.

    Raises:
        ValueError: If the file cannot be read, or contains anything but these options; one line.
    """
    try:
        # The base loader keeps all values as text; the command-line parser converts `no` and `1e-4`.
        options = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: cannot be read: {one_line(error)}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path}: file contains no options; expected lines of the form `name: value`")
    kinds = {field.name: str(field.type) for part in parts for field in dataclasses.fields(part)}
    arguments: dict[str, list[str] | None] = {}
    for name, value in options.items():
        if name not in kinds:
            raise ValueError(f"--config {path}: unknown option {name}: {_hint(name, kinds)}")
        is_list = "list[" in kinds[name]  # a list option may also be one value
        if isinstance(value, dict) or value == [] or (isinstance(value, list) and not is_list):
            expected = "a list with at least one entry" if is_list else "one value"
            raise ValueError(f"--config {path}: {name}: {value!r}; expected {expected}")
        arguments[name] = None if value in ("", "~", "null") else value if isinstance(value, list) else [value]
    return arguments


class _Parser(argparse.ArgumentParser):
    """Argument parser that reports errors in one line, without the usage, and accepts -1e-3 as a number."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        """Raise a `ValueError` in our form, such as "--seed abc: expected an integer", for a message of argparse."""
        flag, _, reason = message.removeprefix("argument ").partition(": ")
        if flag == "the following arguments are required":
            raise ValueError(self._missing(reason.split(", ")))
        if re.fullmatch("expected (one|at least one) argument", reason):
            raise ValueError(f"{flag}: expected a value")
        raise ValueError(f"{flag} {reason}" if message.startswith("argument ") else message)

    def _missing(self, flags: list[str]) -> str:
        """Return the message about missing required options."""
        actions = [self._option_string_actions[flag] for flag in flags]
        names = [
            str(action.metavar) if _is_first(action) else flag for action, flag in zip(actions, flags, strict=True)
        ]
        if len(flags) > 1:
            return f"{', '.join(names)} are missing; see --help"
        choices, meaning = actions[0].choices, (actions[0].help or "").replace("%%", "%").partition(";")[0]
        return f"{names[0]} is missing; expected {'one of ' + ', '.join(choices) if choices else meaning}"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Formatter of `--help` that shows an option without its name if it may be the first argument."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return str(action.metavar) if _is_first(action) else super()._format_action_invocation(action)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        has_spaces = isinstance(action.metavar, str) and " " in action.metavar  # LOW HIGH, not LOW HIGH [LOW HIGH ...]
        return str(action.metavar) if has_spaces else super()._format_args(action, default_metavar)


def _is_first(action: argparse.Action) -> bool:
    """Return whether an option may be the first argument: its placeholder is then its name."""
    return action.metavar == action.dest.upper()


class _KeepForAuto(argparse.Action):
    """For the word `auto`, store the number given before it, or the default, as an `Auto`."""

    def __call__(self, parser: Any, namespace: Any, value: Any, flag: Any = None) -> None:
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, Auto(earlier or 0) if value == "auto" else value)


def _parser(
    parts: Iterable[type], program: str | None = None, doc: str | None = None, add_help: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with one group of options per dataclass."""
    summary, _, rest = (doc or "").strip("\n").partition("\n\n")
    parser = _Parser(
        prog=program or Path(sys.argv[0]).name,
        description=summary,
        epilog=f"examples:\n\n{rest}" if rest else None,
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=add_help,
    )
    required = []
    for part in parts:
        group, hints = parser.add_argument_group(_first_line(part).rstrip(".")), get_type_hints(part)
        for entry in dataclasses.fields(part):
            flag, settings = f"--{_flag(entry)}", _settings(entry, hints[entry.name])
            group.add_argument(flag, dest=entry.name, **settings)
            word = entry.name.upper() if entry.metadata.get("is_first") else f"{flag} ..."
            required += [word] if settings["required"] else []
    parser.usage = " ".join(["%(prog)s", *required, "[--OPTION VALUE ...]"])
    return parser


def _settings(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for an option, from its type, its default and its help."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    shown = default not in (dataclasses.MISSING, None, "", [])
    text = field.metadata["help"].replace("%", "%%") + (f" (default: {_typed(default)})" if shown else "")
    is_required = default is dataclasses.MISSING
    settings: dict[str, Any] = {"help": text, "required": is_required, "default": None if is_required else default}
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if type(None) in get_args(hint):  # X | None
        (hint,) = kinds
    if get_origin(hint) is list:
        (hint,) = get_args(hint)
        settings["nargs"] = "+"
    if get_origin(hint) is Literal:
        return settings | {"choices": get_args(hint), "type": partial(_choice, get_args(hint))}
    if hint is bool:
        settings |= {"nargs": "?", "const": True}
    reader, metavar = _READERS[hint]
    if field.metadata["auto"]:
        settings["action"] = _KeepForAuto
        reader, metavar = _whole_or_auto, f"{metavar}|auto"
    metavar = field.name.upper() if field.metadata.get("is_first") else field.metadata.get("metavar", metavar)
    may_be_empty = hint is str and default == ""
    return settings | {"type": str if may_be_empty else reader, "metavar": metavar}


def _normalized(argv: Iterable[str], parts: Iterable[type]) -> list[str]:
    """Return a command line with normalized options: `--a-b` becomes `--a_b`, `--no_x` becomes `--x=false`."""
    fields, argv = {field.name: field for part in parts for field in dataclasses.fields(part)}, list(argv)
    first = [name for name, field in fields.items() if field.metadata.get("is_first")]
    arguments = [f"--{name}" for name in first if argv and not argv[0].startswith("-")]
    for word in argv:
        name, value = _option_name(word), word.partition("=")[1:]
        if name is None or word == "--":
            arguments.append(word)
        elif name.startswith("no_") and isinstance(getattr(fields.get(name[3:]), "default", None), bool):
            if value[0]:
                raise ValueError(f"{word}: expected --{name} without a value, or --{name[3:]} true or false")
            arguments.append(f"--{name[3:]}=false")
        else:
            arguments.append("".join([f"--{_flag(fields[name]) if name in fields else name}", *value]))
    return arguments


def _option_name(word: str) -> str | None:
    """Return the option name of a command-line argument, with underscores; None for a value."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else None


def _instances(parts: Iterable[type], values: argparse.Namespace) -> list[Any]:
    return [part(**{field.name: getattr(values, field.name) for field in dataclasses.fields(part)}) for part in parts]


def _flag(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("flag", field.name)


def _first_line(part: type) -> str:
    return (part.__doc__ or "").partition("\n")[0]


def _typed(value: object) -> str:
    """Return a value as typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(_typed, value))
    text = str(value)
    return text if text and text.isprintable() and " " not in text else repr(text)


def _invalid(text: str, expected: str) -> argparse.ArgumentTypeError:
    """Return the error of a value; `_Parser` puts the option before it."""
    return argparse.ArgumentTypeError(f"{_typed(text)}: expected {expected}")


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _invalid(text, "a finite number")
    return value


def _whole(text: str, expected: str = "an integer") -> int:
    try:
        value = int(text)
    except ValueError:
        raise _invalid(text, expected) from None
    if abs(value) >= 2**63:
        raise _invalid(text, f"{expected} of at most 63 bits")
    return value


def _whole_or_auto(text: str) -> int | str:
    return text if text == "auto" else _whole(text, "an integer or auto")


def _choice(choices: tuple[str, ...], text: str) -> str:
    if text not in choices:
        raise _invalid(text, f"one of {', '.join(choices)}")
    return text


def _is_opaque_color(text: str) -> bool:
    from PIL import ImageColor  # slow to import

    try:
        parts = ImageColor.getrgb(text)
    except ValueError:
        return False
    return len(parts) == 3 and max(parts) <= 255


def _filled(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise _invalid(text, "a text that is not empty")
    return text


def _truth(text: str) -> bool:
    word = text.lower()
    if word not in ("true", "yes", "t", "y", "1", "false", "no", "f", "n", "0"):
        raise _invalid(text, "true or false")
    return word in ("true", "yes", "t", "y", "1")


# Function that reads a value, and its placeholder in `--help`, by type of the option.
_READERS: dict[Any, tuple[Any, str]] = {
    float: (_finite, "X"),
    int: (_whole, "N"),
    str: (_filled, "TEXT"),
    bool: (_truth, "true|false"),
}


def _hint(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return what to use instead of an unknown option: the entry of `MIGRATION`, or the option of a similar name."""
    entry = MIGRATION.get(name, "")
    if entry and set(re.findall(r"--(\w+)", entry)) <= set(names):
        return f"did you mean {entry.replace('--', prefix)}?" if entry.startswith("--") else entry
    initials = [known for known in names if "_" in known and name == "".join(part[0] for part in known.split("_"))]
    endings = [known for known in names if known.endswith(f"_{name}")]
    close = (
        difflib.get_close_matches(name, names, n=1, cutoff=0.75) or initials or (endings if len(endings) == 1 else [])
    )
    return f"did you mean {prefix}{close[0]}?" if close else "see --help"
