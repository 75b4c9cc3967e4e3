"""`Wire`: values from one rank to some others, one after another."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.agreement.serialization import Known, Parcel, memory_of, tensors_in, unpack
from pipeboost.distributed.collectives.groups import Group


class Kind(IntEnum):
    """What a message is."""

    ERRAND = 0
    """Work to be done."""
    DONE = 1
    """What came of it."""
    FAILED = 2
    """What it raised."""
    OUTCOME = 3
    """What came of a whole request, or what it raised."""
    OVER = 4
    """The last message."""


class Message(NamedTuple):
    """A message as it has arrived.

    Attributes:
        kind: what it is.
        request: the request that it belongs to, by position.
        number: of an errand among those of its request.
        content: of its parcel.
        tensors: of its parcel.
        device: of this rank.
        ready: recorded when the tensors are there; None on a CPU.
    """

    kind: Kind
    request: int
    number: int
    content: bytes
    tensors: list[torch.Tensor]
    device: torch.device
    ready: Any = None

    def open(self, known: Known) -> Any:
        """The value that was sent; on a GPU the current stream waits for it."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.ready)
            for tensor in self.tensors:
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        return unpack(self.content, self.tensors, known, self.device)


class Wire:
    """Messages from the last of some ranks to the others. Every rank of it makes it.

    Tensors go by a group of their device, everything else by one of the CPU. Both are the wire's own, so that nothing
    that ranks say otherwise waits for it.

    Args:
        ranks: of the world, the sender last.
        device: where this rank has its tensors.
        groups: takes the groups, to be closed by whoever has them.
    """

    def __init__(self, ranks: Sequence[int], device: torch.device, groups: list[Group]) -> None:
        self.device = device
        self.control = Group(ranks, "cpu")
        groups.append(self.control)
        self._source = len(ranks) - 1
        self._tensors = self.control
        self._sending = threading.Lock()
        self._torn = False
        if device.type != "cpu":
            self._tensors = Group(ranks, device.type)
            groups.append(self._tensors)
            # It connects at its first use, for which two wires of a rank would otherwise wait in any order.
            self._tensors.broadcast(torch.zeros(1, device=device), self._source)

    def send(self, kind: Kind, request: int = 0, number: int = 0, parcel: Parcel | None = None) -> None:
        """Send a message, from any thread; on a GPU the current stream has the tensors.

        Raises:
            PipeboostError: the call has failed, so that this message, or one before it, did not get through.
        """
        content, tensors = (b"", []) if parcel is None else parcel
        with self._sending:
            if self._torn:
                raise PipeboostError("the ranks beside wait for the rest of a message that has failed")
            self._torn = True  # should this raise
            self.control.broadcast(torch.tensor([kind, request, number, len(content)]), self._source)
            if parcel is not None:
                self.control.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), self._source)
                self._exchange(tensors)
            self._torn = False

    def receive(self) -> Message:
        """Wait for the next message, however long."""
        header = torch.empty(4, dtype=torch.int64)
        self.control.broadcast(header, self._source, whenever=True)
        kind, request, number, length = header.tolist()
        if not length:
            return Message(Kind(kind), request, number, b"", [], self.device)
        content = torch.empty(length, dtype=torch.uint8)
        self.control.broadcast(content, self._source)
        told = content.numpy().tobytes()
        if self.device.type == "cpu":
            tensors = [facts.empty(self.device) for facts in tensors_in(told)]
            self._exchange(tensors)
            return Message(Kind(kind), request, number, told, tensors, self.device)
        # A stream of its own: that of the call goes on.
        with torch.cuda.stream(self._stream):
            tensors = [facts.empty(self.device) for facts in tensors_in(told)]
            self._exchange(tensors)
            return Message(Kind(kind), request, number, told, tensors, self.device, self._stream.record_event())

    @functools.cached_property
    def _stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def _exchange(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.numel():
                group = self._tensors if tensor.device.type == self.device.type else self.control
                group.broadcast(memory_of(tensor), self._source)
