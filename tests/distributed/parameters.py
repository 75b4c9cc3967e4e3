"""Parameters that tests try only where every combination is asked for."""

from typing import Any

import pytest


def exhaustive(*values: Any) -> list[Any]:
    """Return parameters of `make test-distributed` alone; a tuple is several arguments."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)
        for value in values
    ]
