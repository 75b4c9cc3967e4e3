"""`Renumbered`: a store in which torch counts its exchanges of memory handles from the first one that comes.

Torch numbers them by one count for the whole process (`StoreExchange` in CUDASymmetricMemoryUtils.hpp, 2.11 to 2.13).
Where one rank of a group has mapped memory with other ranks before and another has not, they would wait for keys that
nobody writes. It also waits as the rest of a call does: another rank's failure ends it, and other threads go on.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_NUMBERED = re.compile(r"(?P<what>.*?/)(?P<number>\d+)(?P<rest>.*)")
"""Such as `CUDASymmetricMemory/7/0`, of rank 0 in exchange 7, or `CUDASymmetricMemory/8` and more, a barrier."""


class Renumbered(dist.Store):
    """What torch asks of a store in such an exchange. To be kept for as long as torch uses it.

    Args:
        store: of this exchange alone, the same on all ranks.
        waiting: around a wait; what it yields raises once there is no use in waiting any more.
    """

    def __init__(
        self, store: dist.Store, waiting: Callable[[], contextlib.AbstractContextManager[Callable[[], None]]]
    ) -> None:
        super().__init__()
        self._store = store
        self._waiting = waiting
        self._first: int | None = None

    def set(self, key: str, value: Any) -> None:
        """Write a value, which torch hands over as bytes."""
        self._store.set(self._own(key), value)

    def get(self, key: str) -> bytes:
        """A value, once it is there."""
        self.wait([key])
        return bytes(self._store.get(self._own(key)))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Several of them."""
        return [self.get(key) for key in keys]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return once all of these keys are there; `timeout` is the caller's, ours is the call's."""
        own = [self._own(key) for key in keys]
        with self._waiting() as check:
            while not self._store.check(own):
                check()
                time.sleep(0.001)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these keys are there."""
        return bool(self._store.check([self._own(key) for key in keys]))

    def add(self, key: str, value: int) -> int:
        """Add to a number, and return it."""
        return int(self._store.add(self._own(key), value))

    def barrier(self, key: str, world_size: int, timeout: Any = None) -> None:
        """Wait until as many have reached it."""
        if self.add(f"{key}/came", 1) == world_size:
            self.set(f"{key}/all", b"")
        self.wait([f"{key}/all"])

    def _own(self, key: str) -> str:
        found = _NUMBERED.fullmatch(key)
        if found is None:
            return key
        if self._first is None:
            self._first = int(found["number"])
        return f"{found['what']}{int(found['number']) - self._first}{found['rest']}"
