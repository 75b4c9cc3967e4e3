"""Layer-wise streaming: repeated blocks pass through two buffers on the device, one computing, one arriving."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeboost.features.offload.copy_stream import Arrival, CopyStream
from pipeboost.features.offload.host import HostStore

BLOCKS_ON_DEVICE = 2


@dataclass(eq=False)
class _BlockBuffer:
    """Device memory for one block.

    Attributes:
        holds: which block is in it or on its way.
        parts: copies of that block's chunks.
        versions: the version counters of its weights when they were sent.
    """

    memory: torch.Tensor
    holds: int | None = None
    arrival: Arrival | None = None
    parts: list[torch.Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class BlockStream:
    """The weights of one component's repeated blocks, on the host but for the blocks that compute.

    Attributes:
        moved: bytes sent since `open`.
    """

    def __init__(self, blocks: Sequence[nn.Module], copies: CopyStream) -> None:
        self.moved = 0
        self._copies = copies
        # The blocks' middleware holds this object, so it must not hold the blocks.
        self._blocks = [weakref.ref(block) for block in blocks]
        # One chunk a block: a block is sent in one copy.
        self._stores = [HostStore(copies.device, chunk=2**62) for _ in blocks]
        self._others: frozenset[int] = frozenset()
        self._home: torch.device | None = None
        self._buffers: list[_BlockBuffer] = []
        self._computing: list[int] = []
        self._last: int | None = None
        self._follower = {index: (index + 1) % len(blocks) for index in range(len(blocks))}

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that are still alive."""
        return [block for reference in self._blocks if (block := reference()) is not None]

    def shared(self) -> dict[int, torch.Tensor]:
        """Return the weights that more than one block has, by identity."""
        tensors = [tensor for block in self.blocks() for tensor in tensors_of(block)]
        counts = Counter(map(id, tensors))
        return {id(tensor): tensor for tensor in tensors if counts[id(tensor)] > 1}

    def adopt(self, others: Collection[int], home: torch.device | None) -> None:
        """Make each block's store hold the block's weights, without those whose identities are in `others`."""
        self._others, self._home = frozenset(others), home
        for index, store in enumerate(self._stores):
            store.adopt(self._weights(index), home)

    def _weights(self, index: int) -> list[torch.Tensor]:
        block = self._blocks[index]()
        return [] if block is None else [each for each in tensors_of(block) if id(each) not in self._others]

    def open(self) -> None:
        """Allocate the buffers."""
        size = max((store.nbytes for store in self._stores), default=0)
        memory = [self._copies.empty(size) for _ in range(min(BLOCKS_ON_DEVICE, len(self._stores)))]
        self._buffers = [_BlockBuffer(each) for each in memory]
        self.moved, self._last = 0, None

    def close(self) -> None:
        """Free the buffers, once the copies that nobody waited for are done with them and with the host's memory."""
        for buffer in self._buffers:
            if buffer.arrival is not None:
                buffer.arrival.wait()
                buffer.arrival.finish()
        self._buffers = []

    def release(self, home: torch.device | None) -> None:
        """See `HostStore.release`."""
        for store in self._stores:
            store.release(home)

    @contextlib.contextmanager
    def holding(self, index: int) -> Iterator[None]:
        """Inside, the weights of this block are on the device, and those of the block after it are on their way."""
        if index in self._computing:
            yield
            return
        self._follow(index)
        buffer = next((buffer for buffer in self._buffers if buffer.holds == index), None) or self._fetch(index)
        assert buffer.arrival is not None
        buffer.arrival.wait()
        store, parts = self._stores[index], buffer.parts
        store.load(parts)
        self._computing.append(index)
        try:
            self._prefetch(index)
            yield
        finally:
            self._computing.remove(index)
            if store.unload(parts):
                buffer.versions = store.versions()
            else:
                self._follow(index)

    def _follow(self, index: int) -> None:
        """Notice what was done to a block since its weights were sent: adapters added, weights changed or moved."""
        store, weights = self._stores[index], self._weights(index)
        same = store.holds(weights)
        if not same:
            store.adopt(weights, self._home)
        for buffer in self._buffers:
            if buffer.holds == index and not (same and buffer.versions == store.versions()):
                buffer.holds = None

    def _prefetch(self, index: int) -> None:
        """Send for the block that came after this one the last time: a cache may skip those that stand after it."""
        if self._last is not None:
            self._follower[self._last] = index
        self._last = index
        following = self._follower[index]
        # A block that is called inside another may leave no buffer free to fetch ahead.
        if len(self._computing) < len(self._buffers) and all(buffer.holds != following for buffer in self._buffers):
            self._fetch(following)

    def _fetch(self, index: int) -> _BlockBuffer:
        store = self._stores[index]
        buffer = next((buffer for buffer in self._buffers if buffer.holds not in self._computing), None)
        if buffer is None:
            buffer = _BlockBuffer(self._copies.empty(store.nbytes))
            self._buffers.append(buffer)
        if buffer.arrival is not None and buffer.memory.numel() < store.nbytes:
            buffer.arrival.wait()  # before the allocator may hand the old memory on
            buffer.memory = self._copies.empty(store.nbytes)
        buffer.parts = list(buffer.memory[: store.nbytes].split([chunk.nbytes for chunk in store.chunks]))
        buffer.holds, buffer.versions = index, store.versions()
        buffer.arrival = self._copies.send(zip(buffer.parts, (chunk.host for chunk in store.chunks), strict=True))
        self.moved += store.nbytes
        return buffer


def tensors_of(module: nn.Module, *, recurse: bool = True) -> Iterator[torch.Tensor]:
    """Yield parameters and buffers, each once; without `recurse` those of the module itself alone."""
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)
