"""The middleware on a transformer's call that extrapolates what it returns in the steps that a mask skips."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from pipeboost.contract.call import current_call
from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import ConfigurationError
from pipeboost.core.families import Family
from pipeboost.features.cache.extrapolation import sample_elements
from pipeboost.features.cache.state import call_cache
from pipeboost.features.cache.steps import settings_of


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
        # A script may end guidance in the middle, and so make one branch of a batch of two.
        first = args[0] if args else next(iter(kwargs.values()), None)
        samples = len(first) if isinstance(first, list | torch.Tensor) else None
        return branch.run(lambda: self._of_its_size(call_next(*args, **kwargs)), samples)

    def _of_its_size(self, result: Any) -> Any:
        latents = settings_of(self._settings, self._position).latents
        if latents is not None and not latents <= 2 * sample_elements(result) <= 4 * latents:
            raise ConfigurationError(
                f"cache.latents={latents} is the size that this schedule was tuned on, and a sample of this call has "
                f"{sample_elements(result)}, less than half or more than twice as many; tune at this size, or leave "
                "out latents"
            )
        return result
