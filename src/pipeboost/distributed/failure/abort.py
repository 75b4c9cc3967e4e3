"""Ending a call from outside the thread that runs it: breaking the groups it waits in, or the process."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from pipeboost.distributed.failure.records import Failure

if TYPE_CHECKING:
    from pipeboost.distributed.collectives.groups import Group

_NEVER_SENT = 0x7F000000
"""A tag that no message has."""


def abort(group: Group) -> None:
    """Make everything that waits in a group return with an error, on this rank and where its connections end."""
    backend = group.backend
    if backend is None:
        return
    group.halt()
    if group.device == "cuda":
        # It may wait for kernels; nobody waits for it.
        threading.Thread(target=backend.abort, name="pipeboost abort", daemon=True).start()
        return
    # gloo has no other way: a wait that runs out of time closes all connections of its group. Where the one it would
    # wait at is closed already it raises instead and closes nothing, so each is tried.
    for peer in range(group.size):
        if peer != group.rank:
            with contextlib.suppress(RuntimeError):
                backend.recv([torch.zeros(1)], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))


def end_process(rank: int, failure: Failure) -> None:
    """This rank does not leave its call by itself: tell why and where it stands, and end the process."""
    out = sys.__stderr__
    if out is not None:
        print(f"pipeboost: rank {rank} ends, because it does not leave its call: {failure.error()}", file=out)
        faulthandler.dump_traceback(file=out)
        out.flush()
    os._exit(1)
