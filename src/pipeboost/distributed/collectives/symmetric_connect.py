"""`connect`: how the GPUs of a group get `Peers`, by torch's symmetric memory; tried before it is relied on.

Torch numbers its exchanges of memory handles by one count for the whole process (`StoreExchange` in
CUDASymmetricMemoryUtils.hpp, 2.11 to 2.13). Where one rank of a group has mapped memory with other ranks before and
another has not, they would wait for keys that nobody writes; `Renumbered` counts from the first one that comes. It also
waits as the rest of a call does: another rank's failure ends it, and other threads go on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from pipeboost.distributed.collectives.symmetric_buffers import SIGNAL_PAD, Peers, rounded
from pipeboost.distributed.failure.collective_wait import expecting
from pipeboost.distributed.local_processes import this_process
from pipeboost.distributed.start import world

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group

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


Made = TypeVar("Made")

MOST_RANKS = 8
MOST_BYTES = 4 * 2**30
"""Of a rank's memory for the others of a group, all `Peers` together; more is left to NCCL, which needs it for the time
of a transfer only."""
_RENDEZVOUS = "rendezvous of the GPUs' memory"
_PATIENCE = 10.0
"""Seconds for the first exchange, in which kernels are compiled."""


def connect(group: Group, heads_bytes: int, tokens_bytes: int, device: torch.device, name: str) -> Peers | str:
    """Make the memory of all ranks of a group and try it; on every rank the reason where it does not serve one of them.

    Every rank of the group calls it, with the same sizes.
    """
    if group.size > MOST_RANKS:
        return f"the group has more than {MOST_RANKS} ranks"
    store = dist.PrefixStore(f"{group.name} {name}", world().store)
    machine = this_process().host if find_spec("triton") is not None else ""
    cuda = device.type == "cuda"
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    machines, counts = zip(*_all_gather(store, "machine", (machine, multiprocessors), group), strict=True)
    if "" in machines:
        return "a rank has no Triton"
    if len(set(machines)) > 1:
        return "the ranks are on several machines"
    sizes = (rounded(heads_bytes), rounded(tokens_bytes))
    with _registered(group, name) as registered:
        memory, trouble = _managed(lambda: _room(SIGNAL_PAD + sum(sizes), device, registered))
        # All have their own before any looks for the others', which would wait for it.
        if any(_all_gather(store, "room", trouble, group)):
            return "a GPU has no room"
        assert memory is not None
        found, trouble = _managed(lambda: _addresses(memory))
    troubles = [each for each in _all_gather(store, "trouble", trouble, group) if each]
    if troubles:
        return f"a GPU does not reach another's memory: {troubles[0]}"
    assert found is not None
    peers = Peers(group, sizes, memory, found, min(counts))
    if not all(_all_gather(store, "right", _arrives(peers, group, device), group)):
        return "what one GPU wrote into another's memory did not arrive"
    return peers


def _managed(make: Callable[[], Made]) -> tuple[Made | None, str]:
    """What was made, or why it could not be."""
    try:
        return make(), ""
    except RuntimeError as error:
        return None, str(error).splitlines()[0] or type(error).__name__


def _arrives(peers: Peers, group: Group, device: torch.device) -> bool:
    """Whether numbers arrive where they belong: a machine may forbid what its driver promises."""
    ranks, own, heads, head_dim = group.size, 16, 3, 8
    tokens, here = [own] * ranks, slice(group.rank * heads, (group.rank + 1) * heads)
    # Every number says which tensor, token, head and place it is of.
    numbers = torch.arange(3 * ranks * own * ranks * heads * head_dim, device=device, dtype=torch.int32).float()
    whole = numbers.view(3, 1, ranks * own, ranks * heads, head_dim)
    mine = whole[:, :, group.rank * own : (group.rank + 1) * own]
    received: list[torch.Tensor] = []

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        received.append(torch.stack(qkv))
        return qkv[0]

    q, k, v = mine.unbind(0)
    back = peers.attended(q, k, v, tokens, attend, parts=2)
    if device.type == "cuda" and not _done_within(_PATIENCE, device, group):
        peers.stop_waiting()
        return False
    return torch.equal(torch.cat(received, 3), whole[:, :, :, here]) and torch.equal(back, mine[0])


def _done_within(seconds: float, device: torch.device, group: Group) -> bool:
    """Whether the GPU has done what it was given, after so many seconds at most."""
    done, until = torch.cuda.current_stream(device).record_event(), time.monotonic() + seconds
    with expecting(group, "first exchange in the GPUs' memory") as check:
        while not done.query():
            if time.monotonic() > until:
                return False
            check()
            time.sleep(0.001)
    return True


@contextlib.contextmanager
def _registered(group: Group, name: str) -> Iterator[str]:
    """Inside, torch's registry has the ranks under the name that this yields: it looks their store up there."""
    from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory, _unregister_process_group

    registered: Any = f"{group.name} {name}"
    waiting = functools.partial(expecting, group, _RENDEZVOUS)
    store = Renumbered(dist.PrefixStore(f"{registered} memory", world().store), waiting)
    ranks = dist.ProcessGroup(store, group.rank, group.size)  # the registry's reference keeps nothing
    _register_process_group(registered, ranks)
    try:
        _SymmetricMemory.set_group_info(registered, group.rank, group.size, store)
        yield registered
    finally:
        _unregister_process_group(registered)


def _room(nbytes: int, device: torch.device, registered: str) -> torch.Tensor:
    """Memory of this rank that other ranks may map, zeros."""
    from torch._C._distributed_c10d import _SymmetricMemory

    memory = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device, registered)
    memory.zero_()
    torch.cuda.synchronize(device)
    return memory


def _addresses(memory: torch.Tensor) -> list[int]:
    """Where the memory of each rank is, once all have come here."""
    from torch._C._distributed_c10d import _SymmetricMemory

    return list(_SymmetricMemory.rendezvous(memory).buffer_ptrs)


def _all_gather(store: Any, about: str, value: Any, group: Group) -> list[Any]:
    """What each rank of the group has; outside its collectives, since one of them may have failed."""
    store.set(f"{about} {group.rank}", json.dumps(value))
    keys = [f"{about} {rank}" for rank in range(group.size)]
    with expecting(group, _RENDEZVOUS) as check:
        while not store.check(keys):
            check()
            time.sleep(0.001)
    return [json.loads(store.get(key)) for key in keys]
