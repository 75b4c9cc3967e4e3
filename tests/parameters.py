"""Parameters of tests that only `make test-distributed` tries."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def exhaustive(*values: Any, but: Collection[Any] = ()) -> list[Any]:
    """Return parameters, a tuple for several arguments, of which those in `but` are tried by default too."""
    rest = [value if isinstance(value, tuple) else (value,) for value in values if value not in but]
    return [value for value in values if value in but] + [pytest.param(*r, marks=pytest.mark.exhaustive) for r in rest]


def often(values: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """Return parameters: `values`, and the rest of `every` where all combinations are asked for."""
    return [*values, *exhaustive(*(each for each in every if each not in values))]
