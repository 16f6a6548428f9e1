"""Checks of single values, which configurations are made of."""

from __future__ import annotations

import math
from numbers import Number
from typing import Any, get_args

from sdt_deploy.errors import ConfigError

MAX_SIZE = 2**31 - 1
"""Largest size of any axis: ids and indices are int32."""


def check(condition: bool, message: str) -> None:
    """Raise :class:`~sdt_deploy.errors.ConfigError` with ``message`` unless ``condition``."""
    if not condition:
        raise ConfigError(message)


def check_choice(name: str, value: object, literal: Any) -> None:
    """Check that ``value`` is one of those of a ``Literal``.

    Raises:
        ConfigError: if it is not.
    """
    check(
        value in get_args(literal),
        f"{name} must be one of {', '.join(map(repr, get_args(literal)))}, not {shown(value)}",
    )


def is_integer(value: object, low: int, high: int = MAX_SIZE) -> bool:
    """Tell whether ``value`` is an integer, and no boolean, from ``low`` to ``high``."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    """Tell whether ``value`` is a finite number that fits a float, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def plain(value: Any) -> Any:
    """Return a NumPy scalar as the Python number that it stands for, and all else as it is."""
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def shown(value: object) -> str:
    """Return ``value`` as it may stand in a message: its ``repr``, cut if it is long."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_positive(name: str, value: object, high: int = MAX_SIZE) -> None:
    """Check that ``value`` is an integer from 1 to ``high``."""
    check(
        is_integer(value, 1, high),
        f"{name} must be a positive integer up to {high}, not {shown(value)}",
    )


def check_above_zero(name: str, value: object) -> None:
    """Check that ``value`` is a finite number above 0."""
    check(
        is_number(value) and value > 0,  # type: ignore[operator]
        f"{name} must be a finite number above 0, not {shown(value)}",
    )


def check_flag(name: str, value: object) -> None:
    """Check that ``value`` is a boolean."""
    check(isinstance(value, bool), f"{name} must be true or false, not {shown(value)}")
