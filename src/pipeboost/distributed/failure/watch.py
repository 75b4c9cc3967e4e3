"""`watched`: the guard around every call on several ranks. No rank waits for ever, and all learn why a call ended.

Each rank tells the others through the store where it is (`watch_records`, by a `Mail`), and a thread, the `Guard`,
judges what they tell. It ends the call where a rank raised and another waits for it, where a rank's process dies, where
one gives no sign of life, and where ranks wait too long. To end a call it breaks the groups, which wakes whoever waits
in them, and makes this rank raise `RankFailedError` at its next step; a rank that does not come ends its process.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

from pipeboost.distributed.collectives.mesh import Mesh
from pipeboost.distributed.failure.watchdog import Watch

_watches: weakref.WeakKeyDictionary[Mesh, Watch] = weakref.WeakKeyDictionary()
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
            watch = _watches[mesh] = Watch(mesh)
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
    """Tell the other ranks at once that the stage has changed; without it they learn of it within half a second.

    An exception is put down to the stage of which was told last.
    """
    watch = _watches.get(mesh)
    if watch is not None:
        watch.tell()
