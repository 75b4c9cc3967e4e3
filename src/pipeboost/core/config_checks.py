"""What a value of a setting may be: each raises one sentence that names the setting, the value and what is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeboost.core.errors import ConfigurationError, not_one_of, quoted


def require_one_of(argument: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise unless a value is one of these, and of its type: 1 is not True."""
    if not any(isinstance(value, type(each)) and value == each for each in allowed):
        raise not_one_of(argument, value, allowed)


def names_among(argument: str, value: Any, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return a list of names as a tuple; raise where one is not among these."""
    if not isinstance(value, (list, tuple)):
        raise ConfigurationError(f"{argument}={quoted(value)} must be a list of names among {', '.join(allowed)}")
    for name in value:
        require_one_of(argument, name, allowed)
    return tuple(value)


def require_integer(argument: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
    """Raise unless a value is an integer within these bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum or value > (maximum or value):
        allowed = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ConfigurationError(f"{argument}={quoted(value)} must be an integer {allowed}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def checked_mask(argument: str, mask: Any, steps: int | None, presets: Sequence[str]) -> Any:
    """Return a step mask with tuples for its lists, or raise; see `CacheConfig.step_mask`."""
    if isinstance(mask, str) or mask is None:
        if isinstance(mask, str):
            require_one_of(f"{argument}.step_mask", mask, presets)
        if steps is not None:
            raise ConfigurationError(
                f"{argument}.steps={steps} is for a list of computed steps in {argument}.step_mask"
            )
        return mask
    try:
        parts: Any = tuple(mask) if steps is not None else tuple(tuple(bins) for bins in mask)
    except TypeError:
        parts = ()
    if steps is None:
        if len(parts) == 2 and all(part and all(map(_is_positive, part)) for part in parts):
            return parts
        raise ConfigurationError(
            f"{argument}.step_mask={quoted(mask)} must be one of {', '.join(map(repr, presets))}, "
            f"([compute bins], [cache bins]) with positive integers in both, or with {argument}.steps a list of steps"
        )
    numbers = [0, *sorted(part for part in parts if _is_positive(part))]
    if list(parts) != numbers or len(set(numbers)) < len(numbers) or numbers[-1] >= steps:
        raise ConfigurationError(
            f"{argument}.step_mask={quoted(mask)} must list steps from 0, which is always computed, to {steps - 1} in "
            "order"
        )
    return parts


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def field_names(cls: type, nested: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the fields of a settings class; of those that are `nested`, which are of that class too, theirs."""
    names = [field.name for field in dataclasses.fields(cls) if field.name not in nested]
    return (*names, *(f"{outer}.{name}" for outer in nested for name in names))


def from_mapping(cls: type, argument: str, values: Mapping[str, Any]) -> Any:
    """Make a settings class of a mapping of its fields, or raise where there is another key."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{argument} has no setting {quoted(key)}; it has {', '.join(known)}")
    return cls(**values)
