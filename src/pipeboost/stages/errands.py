"""Errands: stages that ranks of a mesh have done by a rank beside it.

Every rank of the mesh asks for the same errands of a request in the same order. The first one sends them, and all of
them get what came of it. The rank beside does the work of the same door with components of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipeboost.core.errors import PipeboostError
from pipeboost.core.families import StageDoor
from pipeboost.distributed.agreement.broadcast import packed_failure, raise_failure
from pipeboost.distributed.agreement.random_state import State, generators_in, global_state
from pipeboost.distributed.agreement.serialization import Known, Parcel, pack
from pipeboost.distributed.beside import Beside
from pipeboost.distributed.wire import Kind
from pipeboost.stages.composition import ENCODING
from pipeboost.stages.ranks import Effects

ERRANDS = "errands"
"""Where the state of a call on a mesh keeps its `Errands`."""
INSIDE = "inside stages"
"""Where a call's state keeps the stages that it is in."""
_PLAIN = (type(None), bool, int, float, str)
_FAREWELL = 2.0
"""Seconds that a rank whose call has failed waits for the others to end theirs alike."""


@dataclass(frozen=True)
class Errand:
    """Work of one door.

    Attributes:
        door: it is.
        args, kwargs: of the door.
        attributes: plain ones of the pipeline, which its script sets and a door may read.
        random: the global random state to draw from; None where requests overlap.
        gradients: whether they are on.
    """

    door: StageDoor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attributes: dict[str, Any]
    random: State | None
    gradients: bool


class Errands:
    """Those of one request, on a rank of the mesh.

    Args:
        beside: the ranks that do them.
        request: its position.
        alone: whether no other request is under way.
    """

    def __init__(self, beside: Beside, request: int, *, alone: bool) -> None:
        self._beside = beside
        self._request = request
        self._alone = alone
        self._asked = 0
        self._result: list[Any] = []

    def ask(self, door: StageDoor, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the door of `owner` returns, and does to random state, arguments and pipeline, on the rank beside.

        Raises:
            Exception: what the door has raised there, on all ranks of the mesh.
            RankFailedError: a rank has failed.
        """
        beside, number = self._beside, self._asked
        self._asked += 1
        place = 0 if door.stage in ENCODING else -1
        pipe = None if door.component else owner
        effects = Effects(generators_in([*args, *kwargs.values()]), beside.device, pipe, everywhere=self._alone)
        known = Known(own_objects(args, kwargs))
        if beside.main:
            random = global_state(beside.device) if self._alone else None
            errand = Errand(door, args, kwargs, _plain_attributes(pipe), random, torch.is_grad_enabled())
            parcel = packed(errand, Known(()), f"an argument of stage {door.stage!r}", beside.rank)
            beside.questions[place].send(Kind.ERRAND, self._request, number, parcel)
        message = beside.inboxes[place].take(
            f"the outcome of stage {door.stage!r}", lambda each: (each.request, each.number) == (self._request, number)
        )
        answer = message.open(known)
        if message.kind is Kind.FAILED:
            raise_failure(answer)
        outcome, found = answer
        effects.repeat(found)
        return outcome

    @contextlib.contextmanager
    def request(self, arguments: dict[str, Any]) -> Iterator[Errands]:
        """Around the whole request: what it has `returned` goes to the ranks beside, or what it raises."""
        generators = generators_in(arguments.values())
        effects = Effects(generators, self._beside.device, None, everywhere=self._alone)
        effects.begin()
        try:
            yield self
        except Exception as error:
            with contextlib.suppress(RuntimeError, PipeboostError):  # the groups may be broken: this is why, or less
                self._tell(Kind.FAILED, packed_failure(error, self._beside.rank))
            raise
        self._tell(Kind.OUTCOME, (self._result, effects.found()))

    def returned(self, result: Any) -> None:
        """What the request returns on this rank, to be told inside `request`."""
        self._result.append(result)

    def _tell(self, kind: Kind, value: Any) -> None:
        if self._beside.main:
            parcel = packed(value, Known(()), "the result of the call", self._beside.rank)
            for wire in self._beside.questions:
                wire.send(kind, self._request, parcel=parcel)


@contextlib.contextmanager
def asking(beside: Beside) -> Iterator[None]:
    """Inside, ranks of a mesh ask for errands; then the ranks beside are told that it is over.

    An exception that all ranks of the mesh raise leaves them in step. Goes around everything that ranks of the mesh
    may raise while those beside wait for errands.
    """
    for inbox in beside.inboxes:
        inbox.start()
    try:
        yield
    except BaseException:
        # Where the call has failed already, its groups are broken, and there is nobody to take leave of.
        with contextlib.suppress(RuntimeError, PipeboostError):
            _take_leave(beside, _FAREWELL)
        raise
    _take_leave(beside, None)


def _take_leave(beside: Beside, patience: float | None) -> None:
    if beside.main:
        for wire in beside.questions:
            wire.send(Kind.OVER)
    for inbox in beside.inboxes:
        inbox.wait_until_over(patience)


def packed(value: Any, known: Known, what: str, rank: int) -> Parcel:
    """A parcel of the value, or of the failure to make one, as `packed_failure` tells it."""
    try:
        return pack(value, known, what)
    except PipeboostError as error:
        return pack(packed_failure(error, rank), Known(()), what)


def own_objects(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a door was given that is not sent back, in an order that is the same on all ranks."""
    given = (*args, *kwargs.values())
    return [each for each in given if isinstance(each, (torch.Tensor, torch.Generator)) or callable(each)]


def _plain_attributes(pipe: Any) -> dict[str, Any]:
    attributes = {} if pipe is None else vars(pipe)
    return {name: value for name, value in attributes.items() if name.startswith("_") and type(value) in _PLAIN}
