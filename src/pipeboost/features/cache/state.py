"""What the caches of one call keep, and what they count; it lives in `call[CACHE]` and ends with the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeboost.contract.call import Call, Slot
from pipeboost.core.config import CacheConfig
from pipeboost.core.families import Family
from pipeboost.features.cache.blocks import BlocksBranch
from pipeboost.features.cache.extrapolation import OutputBranch
from pipeboost.features.cache.masks import computed_steps, settings_of, steps_of_experts

B = TypeVar("B", BlocksBranch, OutputBranch)


@dataclass(frozen=True)
class CacheCount:
    """What one guidance branch of one expert computed and skipped in a call.

    Attributes:
        denoiser: attribute of the pipeline, such as `"transformer"`.
        branch: index of the forward within a step; 0 is the first.
        blocks: the block lists that share the decision, joined by `+`; `output` where the whole transformer is skipped.
        skipped: by the expert's steps, whether they were skipped.
    """

    denoiser: str
    branch: int
    blocks: str
    skipped: tuple[bool, ...]

    @property
    def computed_steps(self) -> int:
        """How many steps were computed."""
        return self.skipped.count(False)

    @property
    def cached_steps(self) -> int:
        """How many steps were skipped."""
        return self.skipped.count(True)


class CallCache:
    """All caches of one call, by expert, row of blocks and guidance branch."""

    def __init__(self, settings: CacheConfig, family: Family, steps: Sequence[int | None]) -> None:
        self._denoisers = family.denoisers
        self._settings = tuple(settings_of(settings, position) for position in range(len(steps)))
        # All masks now: a mask that the second expert cannot have must not stop the call halfway.
        self._masks = tuple(map(computed_steps, self._settings, steps))
        self._branches: dict[tuple[int, str, int], BlocksBranch | OutputBranch] = {}

    def branch(self, kind: type[B], position: int, blocks: str, branch: int) -> B:
        """Return one branch of the expert at `position`; when it takes over from another, what that keeps is dropped.

        Args:
            kind: of what is skipped.
            position: which of the denoisers.
            blocks: the row of blocks, or `"output"`.
            branch: index of the forward within a step.
        """
        key = position, blocks, branch
        if key not in self._branches:
            for (other, _, _), state in self._branches.items():
                if other != position:
                    state.release()
            self._branches[key] = kind(self._settings[position], self._masks[position])
        found = self._branches[key]
        assert isinstance(found, kind)
        return found

    def counts(self) -> tuple[CacheCount, ...]:
        """Return what was computed and skipped so far; it remains after the call."""
        return tuple(
            CacheCount(self._denoisers[position], branch, blocks, tuple(state.skipped))
            for (position, blocks, branch), state in sorted(
                self._branches.items(), key=lambda item: (item[0][0], item[0][2])
            )
        )

    def release(self) -> None:
        """Drop all contexts with their tensors; the counts stay. A forward after this starts afresh."""
        for state in self._branches.values():
            state.release()


CACHE = Slot[CallCache]()


def call_cache(call: Call, settings: CacheConfig, family: Family) -> CallCache:
    """Return the caches of this call, made at its first forward.

    Raises:
        ConfigurationError: a step mask cannot be had for the number of steps that an expert makes in this call.
        UnsupportedError: there is a step mask, but the pipeline does not say how many steps it makes.
    """
    cache = call.get(CACHE)
    if cache is None:
        cache = call[CACHE] = CallCache(settings, family, steps_of_experts(call.pipe, family))
        call.resources.callback(cache.release)
    return cache
