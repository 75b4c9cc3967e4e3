"""The middleware that caches: on every block of a row, or on the transformer's call."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from pipeboost.contract.call import Call, current_call
from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Blocks, Family
from pipeboost.core.seams import stock_class
from pipeboost.distributed import SEQUENCE
from pipeboost.features.cache.blocks import BlocksBranch
from pipeboost.features.cache.extrapolation import OutputBranch
from pipeboost.features.cache.state import CallCache, call_cache


class _Cached:
    """What caches of one transformer know: in whose calls they act, and which expert it is."""

    def __init__(self, *, settings: CacheConfig, family: Family, position: int, owner: Any) -> None:
        self._settings = settings
        self._family = family
        self._position = position
        self._owner = weakref.ref(owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Cached:
        return self

    def _opened(self) -> tuple[Call, CallCache] | None:
        """Return the call this thread is in and its caches; None outside of the owner's calls."""
        call = current_call()
        if call is None or call.owner is not self._owner():
            return None
        return call, call_cache(call, self._settings, self._family)


class CachedOutput(_Cached):
    """Extrapolates the output of one transformer in the calls of one acceleration."""

    def __call__(self, call_next: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        opened = self._opened()
        if opened is None:
            return call_next(*args, **kwargs)
        call, cache = opened
        branch = cache.branch(OutputBranch, self._position, "output", call.branch)
        return branch.run(lambda: call_next(*args, **kwargs))


class CachedSpan(_Cached):
    """One row of blocks of one transformer, with one decision a step, in the calls of one acceleration.

    It is the middleware on the `__call__` of each of its blocks. Stock's loop goes over the blocks as ever; after the
    first blocks it is decided whether the middle ones are computed.

    Attributes:
        name: the paths of the block lists, joined by `+`.
        returns: what each block returns.
    """

    def __init__(self, model: nn.Module, row: tuple[Blocks, ...], **known: Any) -> None:
        super().__init__(**known)
        self.name = "+".join(blocks.path for blocks in row)
        self._paths = tuple(blocks.path for blocks in row)
        # Only weak references: the blocks hold this middleware, and a dropped pipeline must free its memory at once.
        self._model = weakref.ref(model)
        self._places = {id(block): place for place, block in enumerate(self.blocks)}
        self.returns = row[0].returns

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the model has in this row now."""
        model = self._model()
        return [block for path in self._paths for block in operator.attrgetter(path)(model)]

    def __call__(self, call_next: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        opened, place = self._opened(), self._places.get(id(block))
        if opened is None or place is None:
            return call_next(*args, **kwargs)
        call, cache = opened
        if place == 0:
            self._refuse_other_blocks()
        branch = cache.branch(BlocksBranch, self._position, self.name, call.branch)
        tokens = None if call.mesh is None else call.mesh.group(*SEQUENCE)
        which = place, len(self._places), self.returns
        return branch.run(which, lambda: call_next(*args, **kwargs), *_states(*args, **kwargs), tokens)

    def _refuse_other_blocks(self) -> None:
        if list(map(id, self.blocks)) != list(self._places):
            raise UnsupportedError(
                f"the blocks in {self.name} of this {stock_class(self._model()).__name__} were replaced after "
                "acceleration; call accelerate_pipeline again"
            )


def _states(hidden_states: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return hidden_states, encoder_hidden_states
