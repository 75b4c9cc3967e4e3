"""What the caches of one call keep, and what they count; it lives in `call[CACHE]` and ends with the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pipeboost.contract.call import Call, Slot
from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.distributed import Group
from pipeboost.features.cache.extrapolation import OutputBranch
from pipeboost.features.cache.masks import computed_steps
from pipeboost.features.cache.steps import settings_of, steps_of_experts

if TYPE_CHECKING:
    from pipeboost.features.cache.library import BlockRow, Cache


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


@dataclass
class Branch:
    """One row of blocks in one guidance branch of one expert: its cache, and where stock's loop is in it."""

    settings: CacheConfig
    steps: int | None
    mask: list[int] | None
    skipped: list[bool] = field(default_factory=list)
    computing: bool = False
    _cache: Cache | None = None
    _output: Any = None

    @property
    def prepared(self) -> bool:
        """Whether cache-dit holds a context for it."""
        return self._cache is not None

    def prepare(self, row: BlockRow, blocks: Sequence[nn.Module], tokens: Group | None) -> None:
        """Give it a fresh context; `tokens` are the ranks that share the tokens, and so the decision."""
        self._cache = row.cache(blocks, self.settings, steps=self.steps, mask=self.mask, tokens=tokens)

    def release(self) -> None:
        """Drop the context with its tensors; the counts stay."""
        self._cache = self._output = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole row for this step; the result is what its last block would have returned."""
        assert self._cache is not None
        self.computing = True
        try:
            self._output, skipped = self._cache(*args, **kwargs)
        finally:
            self.computing = False
        self.skipped.append(skipped)
        return self._output

    def hand_on(self, *args: Any, last: bool, **kwargs: Any) -> Any:
        """Return the row's result to a later block's call, which must have been given just that.

        Raises:
            UnsupportedError: something changed the states between two blocks, as a ControlNet does.
        """
        output = self._output
        given = (*args, *kwargs.values())
        states = (output,) if isinstance(output, Tensor) else output
        if output is None or not all(any(state is argument for argument in given) for state in states):
            raise UnsupportedError(
                "cache is not possible here: the model changes its states between two blocks, as a ControlNet makes it "
                "do; use cache=None"
            )
        if last:
            self._output = None
        return output


class CallCache:
    """All caches of one call, by expert, row of blocks and guidance branch."""

    def __init__(self, settings: CacheConfig, family: Family, steps: Sequence[int | None]) -> None:
        self._denoisers = family.denoisers
        self._settings = tuple(settings_of(settings, position) for position in range(len(steps)))
        self._steps = tuple(steps)
        # All masks now: a mask that the second expert cannot have must not stop the call halfway.
        self._masks = tuple(map(computed_steps, self._settings, self._steps))
        self._branches: dict[tuple[int, str, int], Branch | OutputBranch] = {}

    def blocks_branch(self, position: int, blocks: str, branch: int) -> Branch:
        """Return the branch of a row of blocks of the expert at `position`."""
        settings, steps, mask = self._settings[position], self._steps[position], self._masks[position]
        state = self._of((position, blocks, branch), lambda: Branch(settings, steps, mask))
        assert isinstance(state, Branch)
        return state

    def output_branch(self, position: int, branch: int) -> OutputBranch:
        """Return the branch of the output of the expert at `position`."""
        settings = self._settings[position]
        mask, order, gate = self._masks[position] or [], settings.taylorseer_order or 0, settings.guidance_gate
        # Only the second branch is gated: of a guider's others nobody says what they are to the first.
        gated = branch == 1 and gate is not None
        first = self.output_branch(position, 0) if gated else None
        state = self._of((position, "output", branch), lambda: OutputBranch(mask, order, first, gate))
        assert isinstance(state, OutputBranch)
        return state

    def _of(self, key: tuple[int, str, int], make: Callable[[], Branch | OutputBranch]) -> Branch | OutputBranch:
        """Return a branch; when one expert takes over from another, what the other keeps is dropped."""
        if key not in self._branches:
            for (position, _, _), state in self._branches.items():
                if position != key[0]:
                    state.release()
            self._branches[key] = make()
        return self._branches[key]

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
