"""`RankTeam`: the ranks that run one accelerated pipeline together, and what they agree on."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeboost.contract.context import ApplyContext, RankContext
from pipeboost.core.config import ParallelConfig
from pipeboost.core.families import Family
from pipeboost.core.hardware import device_of
from pipeboost.distributed import AXES, SEQUENCE, Mesh, agreed_arguments, require_same_state
from pipeboost.distributed.failure.records import failure_from
from pipeboost.features.parallel.cfg_parallel import callback_without_cfg_parallel
from pipeboost.features.parallel.rank_share import shared_encoders
from pipeboost.features.parallel.running_state import RunningState
from pipeboost.features.parallel.ulysses_ring import UlyssesRing


class RankTeam:
    """The ranks of one pipeline. Every rank makes it at the same point of its program, and so it leaves it.

    Args:
        pipe: the pipeline, on this rank's device.
        context: its decisions have a layout.

    Attributes:
        mesh: the ranks.
        token_ranks: how many ranks share the tokens.
        across: attention among the tokens of all ranks; None where each rank has all tokens.
        text_encoders: components whose weights the tensor ranks share; empty where the first rank encodes for all.
        state: what a call runs with on this rank.

    Raises:
        UnsupportedError: they cannot share what they were asked to.
    """

    def __init__(self, pipe: Any, context: ApplyContext) -> None:
        layout: ParallelConfig = context.decisions["parallel"].settings
        self.text_encoders = shared_encoders(pipe, layout, context.model.splits or {})
        self._layout = layout
        self._family: Family = context.family
        self.state = RunningState()
        ranks = None if layout.group is None else torch.distributed.get_process_group_ranks(layout.group)
        self.mesh = Mesh({axis: getattr(layout, axis) for axis in AXES}, ranks=ranks, device=device_of(pipe))
        self._doing = ""  # together, what an error is to be told of; empty once the others know one
        self.token_ranks = self.mesh.group(*SEQUENCE).size
        self.across = UlyssesRing() if self.token_ranks > 1 else None

    @property
    def ranks(self) -> RankContext:
        """The ranks as other features see them."""
        return RankContext(self.mesh, self.across, self.token_ranks, self.reporting)

    @property
    def carrier(self) -> str:
        """What carries heads and tokens between the ranks, in words; empty where they exchange none."""
        return "" if self.mesh.degree("ulysses") == 1 else self.mesh.group("ulysses").carrier

    def watched(self, stage: str) -> contextlib.AbstractContextManager[None]:
        """Inside, what ends a call on one rank ends it on all; it begins in `stage`."""
        return self.mesh.watchdog.watched(stage, timeout=self._layout.timeout)

    @contextlib.contextmanager
    def collective_errors(self, doing: str) -> Iterator[None]:
        """Inside, an error on one rank is an error on all of them; inside `watched`, so that none waits for ever.

        Ranks may fail alone; all leave it together, in step, so that they can take back together what they have done.
        Outside, nothing is exchanged.

        Raises:
            Exception: what this rank has raised.
            RankFailedError: another rank has raised something while it was `doing` this.
        """
        self._doing = doing
        try:
            with self.reporting():
                yield
            self.require_all()
        finally:
            self._doing = ""

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Inside `collective_errors`, an error is sent to the others before anything is undone; each error once."""
        try:
            yield
        except BaseException as error:
            self._exchange(error)
            raise

    def require_all(self) -> None:
        """Inside `collective_errors`, wait until all ranks have come here, or raise what one has raised."""
        self._exchange(None)

    def _exchange(self, error: BaseException | None) -> None:
        control = self.mesh.control
        if not self._doing or control.size == 1:
            return
        doing, self._doing = self._doing, ""  # should this raise
        own = None if error is None else failure_from(error, control.ranks[control.rank], doing)
        first = next(filter(None, control.all_gather_objects(own)), None)
        if first is None:
            self._doing = doing
        elif error is None:
            raise first.error()

    def agreed(self, signature: inspect.Signature, pipe: Any, args: Any, kwargs: Any) -> inspect.BoundArguments:
        """Return the arguments of a call that all ranks go on with.

        Raises:
            DisagreementError: they were called differently.
        """
        bound = agreed_arguments(self.mesh, signature.bind_partial(pipe, *args, **kwargs), self.mesh.device)
        callback = bound.arguments.get("callback_on_step_end")
        if callable(callback):
            bound.arguments["callback_on_step_end"] = callback_without_cfg_parallel(callback)
        return bound

    def require_same_state(self, pipe: Any, counts: Callable[[str], bool]) -> None:
        """Refuse a call that ranks would run with different weights, settings or classes.

        Args:
            pipe: may be a view of the pipeline.
            counts: whether all ranks run the component of a name.

        Raises:
            DisagreementError: on all ranks alike.
        """
        if self.mesh.control.size > 1:
            digests = self.state.digests(pipe, counts)
            require_same_state(self.mesh, digests, functools.partial(self.state.facts, pipe))

    def components(self, pipe: Any) -> dict[str, Any]:
        """Return components that the ranks share besides those that every acceleration looks at."""
        names = [*self.text_encoders, *([self._family.guider] if self._family.guider else [])]
        return {name: pipe.components[name] for name in names}
