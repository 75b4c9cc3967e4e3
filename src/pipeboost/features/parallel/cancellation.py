"""Stops: a call that is to end early on one rank ends on all of them, at the same step.

Ranks tell each other at each step what is asked of them, and hear it at the next one: nobody waits for it. So
`Acceleration.cancel()` and `pipe._interrupt` may reach one rank only, and another thread may set them. What a callback
of the script sets counts at once, as in stock, so after each one the ranks do wait for each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.ledger import Ledger
from pipeboost.distributed import Mesh, Pending

_INTERRUPTED = Slot[bool](bool)


def agree_on_cancellation(scheduler: Any, ledger: Ledger) -> None:
    """Let the ranks of a call hear at each step whether one of them is to end it.

    Raises:
        Cancelled: in a step, on all ranks alike.
    """
    ledger.share_middleware(scheduler, "step", _step, place="scheduler.cancellation", kind="stops")


def agree_on_interrupts(pipe: Any, ledger: Ledger) -> None:
    """Make the `interrupt` that a script reads before each step the same on all ranks of a call."""
    if isinstance(getattr(type(pipe), "interrupt", None), property):
        ledger.add_middleware(pipe, "interrupt", _interrupt, place="pipe.parallel")


class _Told(NamedTuple):
    """What is under way between the ranks.

    Attributes:
        own: two flags, whether this rank is to cancel and to interrupt the call.
        others: the same of each other rank.
    """

    own: torch.Tensor
    others: tuple[torch.Tensor, ...]
    pending: Pending


_TOLD = Slot[_Told]()


def _step(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    result = call_next(*args, **kwargs)
    call = current_call()
    if call is None or not call.of_several_ranks or call.mesh is None:
        return result
    told = call.pop(_TOLD)
    if told is not None:
        cancelled, interrupted = _heard(told)
        if interrupted:
            call[_INTERRUPTED] = True
        if cancelled:
            raise call.cancelled()
    else:
        call.resources.callback(_hear_the_last, call)
    call[_TOLD] = _tell(call, call.mesh)
    return result


def _tell(call: Call, mesh: Mesh) -> _Told:
    control = mesh.control
    own = torch.tensor([call.is_to_be_cancelled, bool(getattr(call.pipe, "_interrupt", False))])
    others = [rank for rank in range(control.size) if rank != control.rank]
    theirs = tuple(torch.zeros_like(own) for _ in others)
    pending = control.exchange([(own, rank) for rank in others], list(zip(theirs, others, strict=True)))
    return _Told(own, theirs, pending)


def _heard(told: _Told) -> tuple[bool, bool]:
    told.pending.wait()
    cancelled, interrupted = torch.stack([told.own, *told.others]).any(dim=0).tolist()
    return cancelled, interrupted


def _hear_the_last(call: Call) -> None:
    """No message may be under way when the call has ended; whoever ends at the same point has sent it."""
    told = call.pop(_TOLD)
    if told is not None:
        with contextlib.suppress(Exception):  # another rank has failed, which the call raises
            told.pending.wait()


def _interrupt(call_next: Callable[..., Any], owner: Any) -> Any:
    here = call_next()
    call = current_call()
    if call is None or not call.of_several_ranks or call.mesh is None or call.pipe is not owner:
        return here
    if call.arguments.get("callback_on_step_end") is not None:
        control = call.mesh.control
        if bool(control.all_gather(torch.tensor([bool(here)]), 0, [1] * control.size).any()):
            call[_INTERRUPTED] = True
    return call[_INTERRUPTED]
