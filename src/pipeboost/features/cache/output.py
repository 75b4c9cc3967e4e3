"""The middleware on a transformer's call that extrapolates what it returns in the steps that a mask skips."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from pipeboost.contract.call import current_call
from pipeboost.core.config import CacheConfig
from pipeboost.core.families import Family
from pipeboost.features.cache.state import call_cache


class CachedOutput:
    """Extrapolates the output of one transformer in the calls of one acceleration."""

    def __init__(self, *, settings: CacheConfig, family: Family, position: int, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        self._settings = settings
        self._family = family
        self._position = position

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedOutput:
        return self

    def __call__(self, call_next: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None or call.owner is not self._owner():
            return call_next(*args, **kwargs)
        branch = call_cache(call, self._settings, self._family).output_branch(self._position, call.branch)
        return branch.run(lambda: call_next(*args, **kwargs))
