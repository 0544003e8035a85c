"""How a wrong name is refused."""

from collections.abc import Sequence


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises a `ValueError` that names the option, its value and what is allowed, unless the value is."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: one of {', '.join(allowed)}")
