"""`watched`: the guard around every call on several ranks. No rank waits for ever, and all learn why a call ended.

Each rank tells the others through the store where it is (`watch_records`, by a `Mail`), and a thread of its own judges
what they tell. It ends the call where a rank raised and another waits for it, where a rank's process dies, where one
gives no sign of life, and where ranks wait too long. To end a call it breaks the groups, which wakes whoever waits in
them, and makes this rank raise `RankFailedError` at its next step; a rank that does not come back ends its process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import selectors
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeboost.distributed.groups import Group
from pipeboost.distributed.mesh import Mesh
from pipeboost.distributed.neighbours import Death
from pipeboost.distributed.start import world
from pipeboost.distributed.waiting import busy_with, querying, waited_for_by
from pipeboost.distributed.watch_mail import Mail
from pipeboost.distributed.watch_records import (
    Counts,
    Ended,
    Failure,
    Record,
    first_error,
    in_step,
    late_for,
    left_behind,
    ranks_in_words,
)
from pipeboost.errors import PipeboostError

_PAUSES = (0.05, 0.5)
"""Seconds between two looks: the timeout by 60, but in these bounds."""
_NEVER_SENT = 0x7F000000
"""A tag that no message has."""
_watches: weakref.WeakKeyDictionary[Mesh, _Watch] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def watched(mesh: Mesh, *, stage: Callable[[], str], timeout: float) -> Iterator[None]:
    """Inside, the ranks of a mesh that share a sample run one call together; every rank enters this for every call.

    An exception on one rank ends the call on all of them: that rank raises it, the others `RankFailedError`. Where all
    raise at the same point, each raises its own, and the next call can have the groups; so it is wherever all ranks
    have come equally far. Calls on one mesh take turns; one inside another is part of it.

    Args:
        mesh: whose ranks they are; nothing is done where it has one rank a sample.
        stage: tells where the call is; called by another thread, so it must not ask for context variables.
        timeout: seconds that ranks may wait in one operation while none loads, compiles or captures (`busy`), and
            that a rank may give no sign of life.

    Raises:
        RankFailedError: another rank has failed, or does not come.
        PipeboostError: the ranks are out of step since an earlier call.
    """
    if mesh.control.size == 1:
        yield
        return
    with _lock:
        watch = _watches.get(mesh)
        if watch is None:
            watch = _watches[mesh] = _Watch(mesh)
    with watch.turn:
        if watch.inside:
            yield
            return
        watch.enter(stage, timeout)
        try:
            yield
        except BaseException as error:
            watch.leave(error)
            raise
        watch.leave(None)


def raise_if_failed(mesh: Mesh) -> None:
    """Raise what ends the call if another rank has failed; cheap, for places that a call passes often.

    Raises:
        RankFailedError: another rank has failed.
    """
    watch = _watches.get(mesh)
    if watch is not None:
        watch.check()


def tell_stage(mesh: Mesh) -> None:
    """Tell the other ranks at once that the stage has changed; without it they learn of it within half a second."""
    watch = _watches.get(mesh)
    if watch is not None:
        watch.tell()


class _Waiting(NamedTuple):
    operations: Counts
    what: str
    since: float


class _Given(NamedTuple):
    """Something the GPU was given to do."""

    event: Any
    operations: Counts
    what: str


class _Watch:
    """What `watched` keeps of one mesh. Its waiting is the `Waiter` of the mesh's groups."""

    def __init__(self, mesh: Mesh) -> None:
        control = mesh.control
        self.turn = threading.RLock()
        self.inside = False
        self._rank = control.ranks[control.rank]
        self._others = tuple(rank for rank in control.ranks if rank != self._rank)
        self._groups = [group for group in mesh.groups if group.size > 1 and set(group.ranks) <= set(control.ranks)]
        self._neighbours = mesh.neighbours
        self._mail = Mail(world().store, control.name, self._rank, self._others, self._record, _PAUSES[1])
        self._timeout = 0.0
        self._stage: Callable[[], str] = str
        self._call = self._open = 0
        self._counts: Counts = {}
        self._waiting: _Waiting | None = None
        self._given: deque[_Given] = deque()
        self._given_since = 0.0
        self._events: list[Any] = []
        self._ended = Ended()
        self._failure: Failure | None = None
        self._failed = threading.Event()
        self._failing = threading.Lock()

    def enter(self, stage: Callable[[], str], timeout: float) -> None:
        """Begin a call."""
        self._require_usable()
        self._stage = stage
        self._timeout = timeout
        self._call += 1
        self._mail.pause = min(max(timeout / 60, _PAUSES[0]), _PAUSES[1])
        self.inside = True
        self._resources = contextlib.ExitStack()
        self._guard = _Guard(self)
        self._resources.callback(self._guard.stop)
        self._resources.callback(self._mail.stop)
        self._resources.enter_context(waited_for_by(self, [group.name for group in self._groups]))
        self._mail.on_news = self._guard.wake
        self._mail.send()
        self._mail.start()
        self._guard.start()

    def leave(self, error: BaseException | None) -> None:
        """End the call: raise what another rank's failure makes this one raise, or return where its own counts.

        Args:
            error: what the call has raised here.
        """
        try:
            if error is not None and self._failure is None and _of_transport(error):
                self._find_out(error)
            own = error is not None and self._failure is None
            told = _told(self._rank, self._where(), error) if own and error is not None else None
            self._waiting = None
            self._ended = Ended(self._call, dict(self._counts), self._open, time.time(), told)
            self.inside = False
            if error is None:
                self._mail.on_news = _nothing  # the guard has nothing left to judge, unless there is an error elsewhere
            self._mail.exchange()
            if error is not None or self._failure is not None or first_error(self.records(), self._call):
                self._compare(patience=self._timeout / 3 if isinstance(error, Exception | None) else 2.0)
                reason = self._failure or first_error(self.records(), self._call)
                if not own and reason is not None:
                    raise reason.error() from error
        finally:
            self.inside = False
            self._resources.close()

    def check(self) -> None:
        """Raise if the call has failed elsewhere."""
        if self._failure is not None:
            raise self._failure.error()

    def tell(self) -> None:
        """Send a record at once."""
        if self.inside:
            self._mail.send()

    def finish(self, work: Any, group: Group, what: str) -> None:
        """As `waiting.finish`."""
        self.check()
        self._wait((work,), self._count({group.name: (1, group.ranks)}), group, what)

    def follow(self, group: Group, what: str) -> None:
        """As `waiting.follow`."""
        self.check()
        self._wait((), self._count({group.name: (1, group.ranks)}), group, what)

    def begin_transfer(self, group: Group, sent: Sequence[int], received: Sequence[int]) -> Counts:
        """Two ranks count what they say to each other by themselves: others need not say as much."""
        self._open += 1
        here = group.ranks[group.rank]
        pairs = [(here, group.ranks[rank]) for rank in sent] + [(group.ranks[rank], here) for rank in received]
        return self._count({f"{group.name}: {a} to {b}": (pairs.count((a, b)), (a, b)) for a, b in pairs})

    def finish_transfer(self, begun: Counts, works: Sequence[Any], group: Group, what: str) -> None:
        """As `waiting.Transfer.finish`."""
        self.check()
        self._wait(works, begun, group, what)
        self._open -= 1

    def _count(self, operations: Counts) -> Counts:
        begun = {
            operation: (self._counts.get(operation, (0,))[0] + number, members)
            for operation, (number, members) in operations.items()
        }
        self._counts.update(begun)
        return begun

    def _wait(self, works: Sequence[Any], operations: Counts, group: Group, what: str) -> None:
        if group.device == "cuda":
            for work in works:
                work.wait()
            if not torch.cuda.is_current_stream_capturing():
                event = self._events.pop() if self._events else torch.cuda.Event()
                event.record()
                self._given.append(_Given(event, operations, what))
            return
        self._waiting = _Waiting(operations, what, time.monotonic())
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._find_out(error)
            self.check()
        finally:
            self._waiting = None

    def records(self) -> dict[int, Record]:
        """What is known of all ranks of the mesh, this one among them."""
        return {**self._mail.records, self._rank: self._record()}

    def _record(self) -> Record:
        waiting = self.waiting()
        return Record(
            beat=time.monotonic_ns(),
            call=self._call,
            inside=self.inside,
            stage=self._where(),
            busy=busy_with(),
            counts=dict(self._counts),
            waiting={} if waiting is None else waiting.operations,
            what="" if waiting is None else waiting.what,
            ended=self._ended,
            failure=self._failure,
        )

    def waiting(self) -> _Waiting | None:
        """What this rank waits for, or its GPU."""
        waiting = self._waiting
        if waiting is None and self._given:
            with contextlib.suppress(IndexError):  # done meanwhile
                given = self._given[0]
                return _Waiting(given.operations, given.what, self._given_since)
        return waiting

    def ask_gpu(self) -> None:
        """Forget what the GPU has done by now."""
        with querying:
            if busy_with():
                return  # a capture may run, in which nobody may ask
            while self._given and self._given[0].event.query():
                self._events.append(self._given.popleft().event)
                self._given_since = time.monotonic()
            if not self._given:
                self._given_since = time.monotonic()

    def _where(self) -> str:
        try:
            return self._stage() if self.inside else "between calls"
        except Exception as error:
            return f"a stage that cannot be told ({error})"

    def fail(self, failure: Failure) -> None:
        """The call has failed: tell it, and wake whoever waits. The first failure counts."""
        with self._failing:
            if self._failure is not None:
                return
            self._failure = failure
        self._failed.set()
        self._mail.hurry()
        for group in self._groups:
            _break(group)

    def _find_out(self, error: BaseException) -> None:
        """A connection broke: whoever broke it has failed, not this rank. Sets the failure."""
        self._mail.hurry()
        self._guard.wake()
        if not self._failed.wait(min(5.0, self._timeout / 2)):
            where = self._where()
            self.fail(Failure(None, where, f"the connection to another rank broke in {where!r}: {error}"))

    def _compare(self, patience: float) -> None:
        """The call has failed here or elsewhere: find out whether the ranks are in step, and let all know if not."""
        self._mail.on_news = self._guard.wake
        until = time.monotonic() + patience
        while self._failure is None:
            records = self.records()
            if all(rank in records and records[rank].has_ended(self._call) for rank in self._others):
                if in_step({rank: record.ended for rank, record in records.items()}):
                    return
                break
            if time.monotonic() > until:
                break
            self._failed.wait(0.01)
            self._mail.exchange()
        self.fail(first_error(self.records(), self._call) or Failure(None, "", "the ranks are out of step"))
        # This process may end now, and the store with it: the others must have heard, though one may be past hearing.
        late = min(5.0, self._timeout)
        until = time.monotonic()
        while unaware := [rank for rank in self._others if not self._knows(rank)]:
            failed = self._failure is not None and unaware == [self._failure.rank]
            if time.monotonic() > until + (min(1.0, late) if failed else late):
                break
            time.sleep(0.01)
            self._mail.exchange()

    def _knows(self, rank: int) -> bool:
        record = self._mail.records.get(rank)
        gone = rank in self._guard.deaths or self._mail.lost is not None
        return gone or record is None or record.failure is not None or record.has_ended(self._call)

    def _require_usable(self) -> None:
        if self._failure is not None:
            raise PipeboostError(
                f"the ranks of this pipeline are out of step since an earlier call failed ({self._failure.what}); "
                "start the ranks again, or where all live call accelerate_pipeline again on every one"
            )


class _Guard:
    """The thread that judges what the ranks tell, for the length of one call."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch
        self.deaths: dict[int, Death] = {}
        self._patience = watch._timeout
        self._looked = self._excused = time.monotonic()
        self._stopping = False
        self._ends: float | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._read, selectors.EVENT_READ)
        self._may_be_dead: set[int] = set()
        for rank, neighbour in watch._neighbours.items():
            if neighbour.descriptor is not None:
                self._selector.register(neighbour.descriptor, selectors.EVENT_READ, rank)
            else:
                self._may_be_dead.add(rank)
        self._thread = threading.Thread(target=self._run, name="pipeboost watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wake(self) -> None:
        """Look now."""
        with contextlib.suppress(BlockingIOError):  # it is awake
            os.write(self._write, b".")

    def stop(self) -> None:
        """Stop looking."""
        self._stopping = True
        self.wake()
        self._thread.join()
        self._watch._mail.on_news = _nothing
        self._selector.close()
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._watch._mail.pause):
                    if key.data is None:
                        os.read(self._read, 4096)
                    else:
                        self._may_be_dead.add(key.data)
                        self._selector.unregister(key.fd)  # it stays readable
                self._look()
        except Exception:
            where = self._watch._where()
            what = f"rank {self._watch._rank} cannot watch the others any more in {where!r}"
            self._watch.fail(Failure(self._watch._rank, where, what, traceback=traceback.format_exc()))

    def _look(self) -> None:
        watch = self._watch
        now = time.monotonic()
        if now - self._looked > watch._mail.pause + 1.0:
            self._excused = now  # this process stood still, so it has heard nothing
        self._looked = now
        if watch._failure is None:
            watch.ask_gpu()
            failure = self._judge(now)
            if failure is not None:
                watch.fail(failure)
        if watch._failure is not None and watch.inside:
            if self._ends is None:
                self._ends = now + min(5.0, self._patience / 2)
            elif now > self._ends:
                _end_process(watch._rank, watch._failure)

    def _judge(self, now: float) -> Failure | None:
        watch = self._watch
        records = watch.records()
        told = [records[rank].failure for rank in watch._others if rank in records]
        for failure in told:
            if failure is not None:
                return failure
        if left_behind(records, watch._call):
            failure = first_error(records, watch._call)
            if failure is not None:
                return failure
        return self._dead() or self._silent(records, now) or self._stalled(records, now)

    def _dead(self) -> Failure | None:
        watch = self._watch
        for rank in sorted(self._may_be_dead):
            if rank not in self.deaths:
                death = watch._neighbours[rank].death()
                if death is None:
                    continue
                self.deaths[rank] = death
                watch._mail.exchange(1.0)  # what it said last
            record = watch._mail.records.get(rank, Record())
            if record.failure is not None:
                return record.failure
            if not record.has_ended(watch._call):
                death = self.deaths[rank]
                error = record.ended.error
                if error is not None and not record.inside:
                    return Failure(rank, error.stage, f"{error.what}, and {death.how}", traceback=error.traceback)
                return Failure(rank, record.stage, f"rank {rank} {death.how} in {record.stage!r}", death.signal)
        return None

    def _silent(self, records: dict[int, Record], now: float) -> Failure | None:
        watch = self._watch
        silent = [
            rank
            for rank in watch._others
            if rank in records
            and records[rank].inside
            and records[rank].call == watch._call
            and now - max(watch._mail.heard[rank], self._excused) > self._patience
        ]
        if not silent:
            return None
        stopped = [rank for rank in silent if rank in watch._neighbours and watch._neighbours[rank].is_stopped()]
        if not stopped and now - watch._mail.answered > self._patience / 2:
            what = f"the store where the ranks meet has not answered for {self._patience:g} s"
            return Failure(None, watch._where(), what)
        rank = (stopped or silent)[0]
        stage = records[rank].stage
        what = f"rank {rank} has given no sign of life for {self._patience:g} s; it was last in {stage!r}"
        return Failure(rank, stage, what)

    def _stalled(self, records: dict[int, Record], now: float) -> Failure | None:
        if any(record.busy for record in records.values()):
            self._excused = now
        waiting = self._watch.waiting()
        if waiting is None or now - max(waiting.since, self._excused) < self._patience:
            return None
        late = late_for(self._watch._rank, records)
        members = ranks_in_words({rank for _, ranks in waiting.operations.values() for rank in ranks})
        if late.rank is None:
            doing = "; ".join(f"rank {rank}: {record.what}" for rank, record in sorted(records.items()) if record.what)
            what = f"{waiting.what} of {members} has not ended for {self._patience:g} s, and no rank is late ({doing})"
            return Failure(None, self._watch._where(), what)
        stage = records.get(late.rank, Record()).stage
        what = (
            f"rank {late.rank} has not come to {waiting.what} of {members} for {self._patience:g} s, and no rank "
            f"loads, compiles or captures; it is in {stage!r}; if it needs longer, raise ParallelConfig(timeout=...)"
        )
        return Failure(late.rank, stage, what)


def _told(rank: int, stage: str, error: BaseException) -> Failure:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Failure(rank, stage, f"rank {rank} raised {type(error).__name__} in {stage!r}", traceback=text)


def _of_transport(error: BaseException) -> bool:
    """Whether an exception is a backend's, which tells of another rank rather than of this one."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "pair closure" in text)
    )


def _break(group: Group) -> None:
    """Make everything that waits in a group return with an error, on this rank and where its connections end."""
    backend = group.backend
    if backend is None:
        return
    if group.device == "cuda":
        # It may wait for kernels; nobody waits for it.
        threading.Thread(target=backend.abort, name="pipeboost abort", daemon=True).start()
        return
    # gloo has no other way: a wait that runs out of time closes all connections of its group.
    peer = (group.rank + 1) % group.size
    with contextlib.suppress(RuntimeError):
        backend.recv([torch.zeros(1)], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))


def _end_process(rank: int, failure: Failure) -> None:
    """This rank does not leave its call by itself: tell why and where it stands, and end the process."""
    out = sys.__stderr__
    if out is not None:
        print(f"pipeboost: rank {rank} ends, because it does not leave its call: {failure.error()}", file=out)
        faulthandler.dump_traceback(file=out)
        out.flush()
    os._exit(1)


def _nothing() -> None:
    return None
