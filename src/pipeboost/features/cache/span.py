"""The middleware on every block of a row: the first block's call runs the row, the others return its result."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from pipeboost.contract.call import current_call
from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Blocks, Family
from pipeboost.core.seams import stock_class
from pipeboost.distributed import SEQUENCE
from pipeboost.features.cache.state import call_cache


class CachedSpan:
    """One row of blocks of one transformer, with one decision a step, in the calls of one acceleration.

    It is the middleware on the `__call__` of each of its blocks. Stock's loop goes over the blocks as ever: its first
    call gives the row to cache-dit, which calls those blocks that it computes (now the middleware lets them through, to
    compile and to the block itself); the loop's other calls return what the row returned.

    Attributes:
        name: the paths of the block lists, joined by `+`.
    """

    def __init__(
        self,
        model: nn.Module,
        row: tuple[Blocks, ...],
        *,
        settings: CacheConfig,
        family: Family,
        position: int,
        owner: Any,
    ) -> None:
        from pipeboost.features.cache.library import BlockRow

        self.name = "+".join(blocks.path for blocks in row)
        self._paths = tuple(blocks.path for blocks in row)
        # Only weak references: the blocks hold this middleware, and a dropped pipeline must free its memory at once.
        self._model = weakref.ref(model)
        self._owner = weakref.ref(owner)
        self._places = {id(block): place for place, block in enumerate(self.blocks)}
        self._row = BlockRow(self.name, row[0].returns)
        self._settings = settings
        self._family = family
        self._position = position

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedSpan:
        return self

    @property
    def owner(self) -> Any:
        """The acceleration in whose calls the row is cached."""
        return self._owner()

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the model has in this row now."""
        model = self._model()
        return [block for path in self._paths for block in operator.attrgetter(path)(model)]

    @property
    def fits(self) -> bool:
        """Whether the blocks take and return their states as the family declares."""
        return self._row.fits(self.blocks)

    def __call__(self, call_next: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        place = self._places.get(id(block))
        if call is None or call.owner is not self.owner or place is None:
            return call_next(*args, **kwargs)
        branch = call_cache(call, self._settings, self._family).blocks_branch(self._position, self.name, call.branch)
        if branch.computing:
            return call_next(*args, **kwargs)
        if place == 0:
            if not branch.prepared:
                tokens = None if call.mesh is None else call.mesh.group(*SEQUENCE)
                branch.prepare(self._row, self._unchanged_blocks(), tokens)
            return branch.run(*args, **kwargs)
        return branch.hand_on(*args, last=place == len(self._places) - 1, **kwargs)

    def _unchanged_blocks(self) -> list[nn.Module]:
        blocks = self.blocks
        if list(map(id, blocks)) != list(self._places):
            raise UnsupportedError(
                f"the blocks in {self.name} of this {stock_class(self._model()).__name__} were replaced after "
                "acceleration; call accelerate_pipeline again"
            )
        return blocks
