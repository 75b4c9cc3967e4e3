"""`Beside`: ranks beside a mesh, which do work for it that the others need not share, and how that comes and goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from pipeboost.distributed.collectives.mesh import Mesh
from pipeboost.distributed.inbox import Inbox
from pipeboost.distributed.start import world
from pipeboost.distributed.wire import Wire


class Beside:
    """The ranks beside a mesh. Those of the mesh and those beside it all make it.

    The first rank of the mesh asks; a rank beside answers all ranks of the mesh.

    Args:
        everyone: all ranks together; takes the groups, and is closed by whoever has it.
        sharing: ranks of the world that are the mesh, in its order.
        beside: the others.
        device: where this rank has its tensors.

    Attributes:
        rank: of this process in the world.
        place: of this rank among those beside; None for a rank of the mesh.
        questions: wires to the ranks beside; on the mesh's first rank, and its own on a rank beside.
        answers: wires from the ranks beside; on the mesh, and its own on a rank beside.
        inboxes: of the call that runs: answers on the mesh, questions beside it.
    """

    def __init__(self, everyone: Mesh, sharing: Sequence[int], beside: Sequence[int], device: torch.device) -> None:
        self.rank = world().rank
        self.everyone = everyone
        self.device = device
        self.place = beside.index(self.rank) if self.rank in beside else None
        self.questions: list[Wire] = []
        self.answers: list[Wire] = []
        self.inboxes: list[Inbox] = []
        self._listening = False
        for rank in beside:
            if self.rank in (sharing[0], rank):
                self.questions.append(Wire((rank, sharing[0]), device, everyone.further))
            if self.rank == rank or self.place is None:
                self.answers.append(Wire((*sharing, rank), device, everyone.further))

    @property
    def main(self) -> bool:
        """Whether this is the rank that asks."""
        return self.place is None and bool(self.questions)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """To be entered around a watched call, whose messages come into `inboxes` once they are started.

        When it is left, the last message has come, or the call has failed and its groups are broken. One inside another
        is part of it.
        """
        if self._listening:
            yield
            return
        self.inboxes = [Inbox(wire) for wire in (self.answers if self.place is None else self.questions)]
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            for inbox in self.inboxes:
                inbox.join()
