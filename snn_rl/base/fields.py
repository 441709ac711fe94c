"""Fields of a recipe that say which values they take, and the check of all of them. Imports no torch.

Each function returns a dataclass field with a default. None is a value of a field whose default it is, or that is
``optional``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
CHECK = "check"  # in a field's metadata: from a value to what it must be, in words, or None where it is that


def count(default: T, *, at_least: int = 1, optional: bool = False) -> T:
    """An integer."""
    words = f"be >= {at_least}"
    return _field(default, lambda value: None if _is(int, value) and value >= at_least else words, optional)


def amount(default: T) -> T:
    """A finite number >= 0."""
    return _field(default, _amount)


def positive(default: T) -> T:
    """A finite number > 0."""
    return _field(default, lambda value: _finite(value) if _is(float, value) and not value <= 0 else "be > 0")


def real(default: T) -> T:
    """A finite number."""
    return _field(default, lambda value: _finite(value) if _is(float, value) else "be a number")


def fraction(default: T) -> T:
    """A number in [0, 1]."""
    return _field(default, lambda value: _amount(value) or (None if value <= 1 else "lie in [0, 1]"))


def percent(default: T) -> T:
    """A number in (0, 100]."""
    return _field(default, lambda value: None if _is(float, value) and 0 < value <= 100 else "lie in (0, 100]")


def switch(default: T) -> T:
    """True or False."""
    return _field(default, lambda value: None if isinstance(value, bool) else "be True or False")


def choice(default: T, *values: T) -> T:
    """One of ``values``."""
    words = f"be one of {', '.join(map(str, values))}"
    return _field(default, lambda value: None if value in values else words)


def check_fields(config: Any, prefix: str = "") -> None:
    """Raises ValueError where a field of a dataclass, or of one inside it, holds a value that it does not take."""
    for field in dataclasses.fields(config):
        value, check = getattr(config, field.name), field.metadata.get(CHECK)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{prefix}{field.name}.")
        if check is not None and (wanted := check(value)) is not None:
            raise ValueError(f"{prefix}{field.name} must {wanted}, got {value!r}")


def _field(default: T, check: Callable[[Any], str | None], optional: bool = False) -> T:
    def checked(value: Any) -> str | None:
        return None if value is None and (optional or default is None) else check(value)

    return dataclasses.field(default=default, metadata={CHECK: checked})


def _is(kind: type, value: Any) -> bool:
    """Whether ``value`` is an integer, or any number; True and False are none."""
    return isinstance(value, int | kind) and not isinstance(value, bool)


def _amount(value: Any) -> str | None:
    return _finite(value) if _is(float, value) and not value < 0 and value == value else "be >= 0"


def _finite(value: float) -> str | None:
    return None if math.isfinite(value) else "be finite"
