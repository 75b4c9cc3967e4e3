"""`Heartbeat`: signed records between the ranks of a sample, by connections of their own that nobody waits for.

Each rank keeps a store, to which the others write; it reads its own. What the system has taken arrives, even if the
process that wrote it dies in the next moment, and a process that stands still holds up nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import secrets
import socket
import struct
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pipeboost.distributed.authentication import ForgeryError, shared_secret, sign, verify
from pipeboost.distributed.failure.local_processes import Neighbour, Process, this_process
from pipeboost.distributed.failure.records import Record

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group

_CONNECTING = timedelta(seconds=30)
_UNANSWERED = 200
"""Records to a rank that says nothing: more might not find room where it has been stopped, and be waited for."""
_GET_ADDRESS = 0x8915
"""Linux' SIOCGIFADDR."""


class Heartbeat:
    """What this rank and the others of a sample hear from each other.

    Every rank of the group, which carries CPU tensors, makes it at the same point of its program. A record is used only
    with the signature of its rank, by a secret that the ranks have drawn and exchanged over the group.
    """

    def __init__(self, group: Group) -> None:
        self.rank = group.ranks[group.rank]
        self.records: dict[int, Record] = {}  # the latest of each other rank
        self.heard: dict[int, float] = {}  # when, by `time.monotonic`, that came
        self.neighbours: dict[int, Neighbour] = {}  # the processes of other ranks on this machine
        self.gone: set[int] = set()  # ranks that may be dead: the system says so, or their connection broke
        self._lock = threading.Lock()
        self._unanswered: Counter[int] = Counter()
        self._forged: set[int] = set()
        self._others: dict[int, Any] = {}
        if group.size == 1:
            return
        told = group.all_gather_objects((this_process(), secrets.token_bytes()))
        self._secret = b"".join((shared_secret(), *(token for _, token in told)))
        processes: dict[int, Process] = {rank: each for rank, (each, _) in zip(group.ranks, told, strict=True)}
        self.neighbours = {rank: Neighbour(each) for rank, each in processes.items() if each.is_neighbour()}
        self.gone |= {rank for rank, each in self.neighbours.items() if each.descriptor is None}  # to be looked at
        host = "127.0.0.1" if len(self.neighbours) == group.size - 1 else _own_address()
        family, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(place[:2], family=family)
        here, port = listening.getsockname()[:2]
        self._own: Any = dist.TCPStore(here, port, None, True, _CONNECTING, False, master_listen_fd=listening.detach())
        self._own.set_timeout(timedelta(seconds=1))
        for rank, theirs in zip(group.ranks, group.all_gather_objects((here, port)), strict=True):
            if rank != self.rank:
                self._others[rank] = dist.TCPStore(theirs[0], theirs[1], None, False, _CONNECTING, False)
        self._send(Record())
        group.all_gather_objects("connected")  # so that a record of each is there

    def exchange(self, compose: Callable[[], Record]) -> None:
        """Send what `compose` makes, and read the records of the others."""
        with self._lock:  # so that none replaces a later one
            self._send(compose())
        self.receive()

    def _send(self, record: Record) -> None:
        message = sign(pickle.dumps(record), str(self.rank), self._secret)
        for rank, store in self._others.items():
            if rank not in self.gone and self._unanswered[rank] < _UNANSWERED:
                self._unanswered[rank] += 1
                try:
                    store.set(str(self.rank), message)
                except dist.DistError:
                    self.gone.add(rank)

    def receive(self) -> None:
        """Read the records of the others."""
        with self._lock, contextlib.suppress(dist.DistError):  # who removed one has forged silence, which counts too
            for rank, message in zip(self._others, self._own.multi_get([*map(str, self._others)]), strict=True):
                self._read(rank, message)

    def _read(self, rank: int, message: bytes) -> None:
        try:
            record: Record = pickle.loads(verify(message, str(rank), self._secret))
        except ForgeryError:
            if rank in self._forged:
                return
            self._forged.add(rank)
            warnings.warn(f"rank {self.rank} ignores what somebody else says in rank {rank}'s name", stacklevel=2)
            return
        if rank not in self.records or record.beat > self.records[rank].beat:
            self.heard[rank], self._unanswered[rank] = time.monotonic(), 0
            self.records[rank] = record

    def wait(self, seconds: float, woken: Connection) -> bool:
        """Wait until a neighbour dies, the other end of `woken` is closed or the time is over; whether it is closed."""
        alive = {rank: each.descriptor for rank, each in self.neighbours.items() if rank not in self.gone}
        ready = wait([woken, *filter(None, alive.values())], seconds)
        self.gone |= {rank for rank, descriptor in alive.items() if descriptor in ready}
        return woken in ready

    def close(self) -> None:
        """Give up the connections."""
        with self._lock:
            self._others.clear()
            self._own = None
        for neighbour in self.neighbours.values():
            neighbour.close()


def _own_address() -> str:
    """Where other machines reach this one: as gloo has it, which has connected the ranks already."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not name:
        return socket.gethostname()
    with socket.socket() as asking:
        told = fcntl.ioctl(asking.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()))
    return socket.inet_ntoa(told[20:24])
