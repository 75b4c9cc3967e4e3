"""`Group`: some ranks and their collectives. A group of one rank sends nothing.

Groups are ours alone: they are made from torch's backends, gloo for CPU tensors and NCCL for CUDA tensors, without
torch.distributed's process-wide registry, and are gone once closed. What runs inside compiled blocks is an operator.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions

from pipeboost.distributed.authentication import shared_secret, sign, verify
from pipeboost.distributed.collectives.symmetric_buffers import Peers, rounded
from pipeboost.distributed.collectives.symmetric_connect import MOST_BYTES, connect
from pipeboost.distributed.failure.collective_wait import Operations, Pending, finish
from pipeboost.distributed.start import world

LIMIT = timedelta(minutes=30)
"""When torch's own backends give up; `collective_wait` gives up long before."""
_CONNECTING = timedelta(minutes=1)
"""For ranks that have all arrived to connect."""
_NEVER_SENT = 0x7F000000
"""A tag that no message has."""
_groups: weakref.WeakValueDictionary[str, Group] = weakref.WeakValueDictionary()
_made: Counter[tuple[str, tuple[int, ...]]] = Counter()


class Group:
    """Ranks that communicate. Every rank of the group makes it, and then the same calls, in the same order.

    Args:
        ranks: of the world, in the order of the group.
        device: type of the device whose tensors it carries.

    Attributes:
        name: by which operators find it; unlike that of any other group.
        rank: this process's position in `ranks`.
        size: how many there are.
        backend: torch's; None for a group of one.
        unreachable: why its GPUs do not write into each other's memory, once that was tried and failed.
        operations: where they are counted and waited for; the watchdog's, where calls are watched.
    """

    def __init__(self, ranks: Sequence[int], device: str) -> None:
        everyone = world()
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(everyone.rank)
        self.size = len(self.ranks)
        self.device = device
        serial = _made[device, self.ranks]
        _made[device, self.ranks] += 1
        self.name = f"pipeboost {device} {'-'.join(map(str, self.ranks))} {serial}"
        self.backend: Any = None
        self._peers: list[Peers] = []
        self.unreachable: str | None = None
        self.operations = Operations()
        if self.size > 1:
            self.backend = _backend(device, dist.PrefixStore(self.name, everyone.store), self.rank, self.size)
        _groups[self.name] = self

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, a new tensor, the same to the bit on all."""
        return tensor if self.size == 1 else torch.ops.pipeboost.all_reduce(tensor, self.name)

    def all_gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """Return the ranks' tensors concatenated along `dim`, of which rank `r` has `sizes[r]`."""
        if self.size == 1:
            return tensor
        return torch.ops.pipeboost.all_gather(tensor, dim, list(sizes), self.name)

    def all_to_all(self, tensor: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Hand every rank its part of `tensor`: along dim 0, `sent[r]` entries to rank `r`, `received[r]` from it."""
        if self.size == 1:
            return tensor
        return torch.ops.pipeboost.all_to_all(tensor, list(sent), list(received), self.name)

    def shift(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> Pending:
        """Begin to send `tensors` to the next rank and to receive the previous rank's `into` these, as a ring.

        All are contiguous, and stay untouched until the result was waited for.
        """
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return self.exchange([(tensor, following) for tensor in tensors], [(tensor, previous) for tensor in into])

    def exchange(
        self, sent: Sequence[tuple[torch.Tensor, int]], received: Sequence[tuple[torch.Tensor, int]]
    ) -> Pending:
        """Begin to send contiguous tensors to ranks of the group, and to receive into others from some.

        What one rank sends another arrives in the order in which it was sent, whatever they send to others.
        """
        if self.device == "cuda":
            self.backend._start_coalescing()
        # Each transfer is tagged with its number among those with the same rank, which the other rank counts alike.
        to, of = defaultdict[int, Any](itertools.count), defaultdict[int, Any](itertools.count)
        works = [self.backend.send([tensor], rank, next(to[rank])) for tensor, rank in sent]
        works += [self.backend.recv([tensor], rank, next(of[rank])) for tensor, rank in received]
        if self.device == "cuda":
            works = [self.backend._end_coalescing()]
        ranks = [rank for _, rank in sent], [rank for _, rank in received]
        return Pending(works, self, *ranks, f"exchange on {self.device}")

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Write the contiguous tensor of rank `source` of the group into the others' in place."""
        if self.size > 1:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = source, 0
            finish(self, "broadcast", self.backend.broadcast([tensor], options))

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Return the value of each rank, in the order of the group; anything that can be pickled."""
        if self.size == 1:
            return [value]
        signed = sign(pickle.dumps(value), self.name, shared_secret())
        own = torch.frombuffer(bytearray(signed), dtype=torch.uint8).to(self.device)
        lengths = self.all_gather(torch.tensor([own.numel()], device=self.device), 0, [1] * self.size).tolist()
        messages = [part.numpy().tobytes() for part in self.all_gather(own, 0, lengths).cpu().split(lengths)]
        return [pickle.loads(verify(message, self.name, shared_secret())) for message in messages]

    def peers(self, heads_bytes: int, tokens_bytes: int, device: torch.device) -> Peers | None:
        """Return the GPUs' memory for exchanges of these sizes, the same on all ranks; None where NCCL carries them.

        The first that is large enough serves, so that what one rank runs and another replays from a CUDA graph is by
        the same. Each is an eighth larger than it must be but for the first, so that prompts which grow by a token at a
        time do not make one each.
        """
        if self.device != "cuda" or self.size == 1:
            return None
        for made in self._peers:
            if made.heads_bytes >= heads_bytes and made.tokens_bytes >= tokens_bytes:
                return made
        if self.unreachable:
            return None
        if self._peers:
            latest = self._peers[-1]
            heads_bytes = max(latest.heads_bytes, heads_bytes * 9 // 8)
            tokens_bytes = max(latest.tokens_bytes, tokens_bytes * 9 // 8)
        if self._room + rounded(heads_bytes) + rounded(tokens_bytes) > MOST_BYTES:
            return None
        connected = connect(self, heads_bytes, tokens_bytes, device, f"peers {len(self._peers)}")
        if isinstance(connected, str):
            self.unreachable = connected
            return None
        self._peers.append(connected)
        return connected

    @property
    def carrier(self) -> str:
        """Return a description of what carries heads and tokens between its ranks."""
        if self._peers:
            return f"writing into the other GPUs' memory, for which each has {self._room / 2**20:.0f} MiB"
        backend = "NCCL" if self.device == "cuda" else "gloo"
        return backend if self.unreachable is None else f"{backend}, since {self.unreachable}"

    @property
    def _room(self) -> int:
        return sum(peers.heads_bytes + peers.tokens_bytes for peers in self._peers)

    def abort(self) -> None:
        """Make everything that waits in the group return with an error, on this rank and where its connections end."""
        for peers in self._peers:
            peers.stop_waiting()
        if self.backend is not None and self.device == "cuda":
            # It may wait for kernels; nobody waits for it.
            threading.Thread(target=self.backend.abort, name="pipeboost abort", daemon=True).start()
        elif self.backend is not None:
            # gloo has no other way: a wait that runs out of time closes all connections of its group. Where the one it
            # would wait at is closed already it raises instead and closes nothing, so each is tried.
            for peer in set(range(self.size)) - {self.rank}:
                with contextlib.suppress(RuntimeError):
                    self.backend.recv([torch.zeros(1)], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Give up the group. Every rank of it does so."""
        _groups.pop(self.name, None)
        self._peers.clear()
        if self.backend is not None:
            self.backend.shutdown()
            self.backend = None


def _backend(device: str, store: Any, rank: int, size: int) -> Any:
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = LIMIT
        return dist.ProcessGroupNCCL(store, rank, size, options)
    backend = dist.ProcessGroupGloo(store, rank, size, _CONNECTING)
    backend._set_default_timeout(LIMIT)
    return backend


@torch.library.custom_op("pipeboost::all_reduce", mutates_args=())
def _all_reduce(tensor: torch.Tensor, group: str) -> torch.Tensor:
    found = _groups[group]
    result = tensor.clone(memory_format=torch.contiguous_format)
    finish(found, "all-reduce", found.backend.allreduce([result], dist.AllreduceOptions()))
    return result


_all_reduce.register_fake(lambda tensor, group: torch.empty_like(tensor, memory_format=torch.contiguous_format))


@torch.library.custom_op("pipeboost::all_gather", mutates_args=())
def _all_gather(tensor: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    found = _groups[group]
    longest = max(sizes)
    # Along the first dimension ranks follow each other in memory; a shorter part is filled up, and cut again below.
    own = tensor.movedim(dim, 0).contiguous()
    if own.shape[0] < longest:
        own = torch.cat([own, own.new_zeros((longest - own.shape[0], *own.shape[1:]))])
    everyone = own.new_empty((found.size * longest, *own.shape[1:]))
    finish(found, "all-gather", found.backend._allgather_base(everyone, own, AllgatherOptions()))
    if min(sizes) < longest:
        everyone = torch.cat([part[:size] for part, size in zip(everyone.split(longest), sizes, strict=True)])
    return everyone.movedim(0, dim).contiguous()


@_all_gather.register_fake
def _all_gather_shape(tensor: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = sum(sizes)
    return tensor.new_empty(shape)


@torch.library.custom_op("pipeboost::all_to_all", mutates_args=())
def _all_to_all(tensor: torch.Tensor, sent: list[int], received: list[int], group: str) -> torch.Tensor:
    found = _groups[group]
    result = tensor.new_empty((sum(received), *tensor.shape[1:]))
    options = dist.AllToAllOptions()
    work = found.backend.alltoall_base(result, tensor.contiguous(), received, sent, options)
    finish(found, "all-to-all", work)
    return result


_all_to_all.register_fake(lambda tensor, sent, received, group: tensor.new_empty((sum(received), *tensor.shape[1:])))
