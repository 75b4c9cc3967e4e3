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
from pipeboost.distributed.failure.records import Record
from pipeboost.distributed.local_processes import Death, LocalProcess, this_process

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group

_CONNECTING = timedelta(seconds=30)
_UNANSWERED = 200
"""Records to a rank that sends none: more might not find room where it has been stopped, and be waited for."""
_LAST_WORDS = 0.05
"""Seconds in which what a dead rank has sent is there to be read."""
_GET_ADDRESS = 0x8915
"""Linux' SIOCGIFADDR."""


class Heartbeat:
    """What this rank and the others of a sample learn from each other.

    Every rank of the group, which carries CPU tensors, makes it at the same point of its program. A record is used only
    with the signature of its rank, by a secret that the ranks have drawn and exchanged over the group.
    """

    def __init__(self, group: Group) -> None:
        self.rank = group.ranks[group.rank]
        self.records: dict[int, Record] = {}  # the latest of each other rank
        self.received: dict[int, float] = {}  # when, by `time.monotonic`
        self.deaths: dict[int, Death] = {}
        self._lock = threading.Lock()
        self._unanswered: Counter[int] = Counter()
        self._forged: set[int] = set()
        self._others: dict[int, Any] = {}
        self._local: dict[int, LocalProcess] = {}
        if group.size == 1:
            return
        processes, tokens = zip(*group.all_gather_objects((this_process(), secrets.token_bytes())), strict=True)
        self._secret = b"".join((shared_secret(), *tokens))
        self._local = {
            rank: LocalProcess(each) for rank, each in zip(group.ranks, processes, strict=True) if each.is_local()
        }
        host = "127.0.0.1" if len(self._local) == group.size - 1 else _own_address()
        family, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(place[:2], family=family)
        here, port = listening.getsockname()[:2]
        self._own: Any = dist.TCPStore(here, port, None, True, _CONNECTING, False, master_listen_fd=listening.detach())
        self._own.set_timeout(timedelta(seconds=1))
        addresses: list[tuple[str, int]] = group.all_gather_objects((here, port))
        for rank, address in zip(group.ranks, addresses, strict=True):
            if rank != self.rank:
                self._others[rank] = dist.TCPStore(address[0], address[1], None, False, _CONNECTING, False)
        self._send(Record())
        group.all_gather_objects("connected")  # so that a record of each is there

    def exchange(self, compose: Callable[[], Record], *, deaths: bool = False) -> None:
        """Send what `compose` makes, and read the records of the others.

        Args:
            deaths: look also which of them have died; by the time `deaths` has one, `records` has what it sent last.
        """
        with self._lock:  # so that none replaces a later one
            found = {rank: process.death() for rank, process in self._alive.items()} if deaths else {}
            dead = {rank: death for rank, death in found.items() if death is not None} | self._send(compose())
            if dead:
                time.sleep(_LAST_WORDS)
            with contextlib.suppress(dist.DistError):  # who removed one has forged silence, which counts too
                for rank, message in zip(self._others, self._own.multi_get([*map(str, self._others)]), strict=True):
                    self._read(rank, message)
            self.deaths |= dead

    def wait(self, seconds: float, woken: Connection) -> bool:
        """Wait until a local process dies or the time is over; return True at once where `woken` has an end."""
        dying = [each.descriptor for each in self._alive.values() if each.descriptor is not None]
        return woken in wait([woken, *dying], seconds)

    @property
    def _alive(self) -> dict[int, LocalProcess]:
        return {rank: process for rank, process in self._local.items() if rank not in self.deaths}

    def _send(self, record: Record) -> dict[int, Death]:
        """Send a record; return which ranks of other machines are gone."""
        dead = {}
        message = sign(pickle.dumps(record), str(self.rank), self._secret)
        for rank, store in self._others.items():
            if rank not in self.deaths and self._unanswered[rank] < _UNANSWERED:
                self._unanswered[rank] += 1
                try:
                    store.set(str(self.rank), message)
                except dist.DistError:
                    if rank not in self._local:  # of those the system knows more
                        dead[rank] = Death("has gone: its connection broke")
        return dead

    def _read(self, rank: int, message: bytes) -> None:
        try:
            record: Record = pickle.loads(verify(message, str(rank), self._secret))
        except ForgeryError:
            if rank not in self._forged:
                self._forged.add(rank)
                text = f"rank {self.rank} ignores what somebody else sends in rank {rank}'s name"
                warnings.warn(text, stacklevel=2)
            return
        if rank not in self.records or record.beat > self.records[rank].beat:
            self.received[rank], self._unanswered[rank] = time.monotonic(), 0
            self.records[rank] = record

    def close(self) -> None:
        """Give up the connections."""
        with self._lock:
            self._others.clear()
            self._local.clear()
            self._own = None


def _own_address() -> str:
    """Where other machines reach this one: as gloo has it, which has connected the ranks already."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not name:
        return socket.gethostname()
    with socket.socket() as asking:
        answer = fcntl.ioctl(asking.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()))
    return socket.inet_ntoa(answer[20:24])
