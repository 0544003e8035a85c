"""Check the types and ranges of values read from files."""

import inspect
import math
import numbers
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CheckedConfig:
    """Mixin for diffusers' `ConfigMixin` classes that checks a configuration when it is loaded from a file."""

    config_name: str | None

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a configuration as diffusers does, and check it.

        Raises:
            ValueError: If it is invalid; one line that names file, key and value.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        folder = kwargs.get("subfolder") or Path(str(pretrained_model_name_or_path)).name
        try:
            if not isinstance(config, dict):
                raise ValueError("not a JSON object")
            cls.check_config(config)
        except ValueError as error:
            raise ValueError(f"{folder}/{cls.config_name}: {error}") from error
        return loaded

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise a `ValueError` that names a key and its value, unless all types and values are valid."""
        check_types(config, {"_class_name": str, "_diffusers_version": str, **parameter_types(cls.__init__)})
        cls.check_values({**_defaults(cls.__init__), **config})

    @classmethod
    def check_values(cls, config: Mapping[str, Any]) -> None:
        """Raise a `ValueError` unless the values are valid; their types have been checked. Override this method."""


def check_range(values: Mapping[str, Any], least: float, most: float, *names: str) -> None:
    """Raise a `ValueError` that names a value outside [least, most]; values of None are not checked."""
    for name in names:
        value = values[name]
        for number in value if isinstance(value, list | tuple) else (value,):
            if number is not None and not least <= number <= most:
                raise ValueError(f"{name}={_short(value)}: expected {least:g} to {most:g}")


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names a value and the type it should have, unless all have the annotated types.

    Args:
        values: Values by name; names without an annotation are not checked.
        hints: Annotations by name: classes, unions, `Literal`, `list`, `tuple` and `dict` of these. As in JSON, a list
            is accepted for a tuple and an int for a float. Floats must be finite, and a bool is not a number.
    """
    for name, hint in hints.items():
        if name in values and not conforms(values[name], hint):
            raise ValueError(f"{name}={_short(values[name])}: expected {describe(hint)}")


def parameter_types(function: Any) -> dict[str, Any]:
    """Return the annotations of a function's parameters by name."""
    hints = typing.get_type_hints(inspect.unwrap(function))
    return {name: hint for name, hint in hints.items() if name != "return"}


def _defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return {part.name: part.default for part in parameters if part.default is not part.empty}


def conforms(value: Any, hint: Any) -> bool:
    """Return whether a value matches a type annotation; see `check_types`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            conforms(key, parts[0]) and conforms(item, parts[1]) for key, item in value.items()
        )
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        if origin is list or (len(parts) == 2 and parts[1] is Ellipsis):
            return all(conforms(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(conforms, value, parts))
    if hint is float:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        # torch does not support larger integers.
        return is_number and math.isfinite(value) and (isinstance(value, float) or abs(value) < 2**63)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63
    return hint is Any or isinstance(value, type(None) if hint is None else hint)


def describe(hint: Any) -> str:
    """Return a description of a type annotation for error messages."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, parts))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is dict:
        return f"an object of {describe(parts[1])}"
    if origin is list or (origin is tuple and parts[1:] == (Ellipsis,)):
        return f"a list of {describe(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)} {describe(parts[0])}"
    names = {int: "int", float: "a finite number", str: "text", bool: "true or false", type(None): "null", None: "null"}
    return names.get(hint) or getattr(hint, "__name__", str(hint))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
