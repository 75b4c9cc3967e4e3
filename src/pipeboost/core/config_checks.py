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


def require_integer(argument: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
    """Raise unless a value is an integer within these bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum or value > (maximum or value):
        allowed = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ConfigurationError(f"{argument}={quoted(value)} must be an integer {allowed}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def checked_bins(argument: str, mask: Any, presets: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return `([compute bins], [cache bins])` as tuples, or raise; `presets` are what may stand in their place."""
    try:
        compute, cache = (tuple(bins) for bins in mask)
    except (TypeError, ValueError):
        compute = cache = ()
    every = (*compute, *cache)
    if not compute or not cache or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in every):
        raise ConfigurationError(
            f"{argument}={mask!r} must be one of {', '.join(map(repr, presets))} or "
            "([compute bins], [cache bins]) with positive integers in both"
        )
    return compute, cache


def is_process_group(group: Any) -> bool:
    """Whether a value is a process group of torch.distributed, which is loaded for this alone."""
    import torch.distributed

    return torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)


def from_mapping(cls: type, argument: str, values: Mapping[str, Any]) -> Any:
    """Make a settings class of a mapping of its fields, or raise where there is another key."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{argument} has no setting {quoted(key)}; it has {', '.join(known)}")
    return cls(**values)
