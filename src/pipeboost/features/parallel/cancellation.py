"""What ranks agree on at each step: that all still run, that their latents are equal, and whether the call ends early.

Ranks send each other at each step what is asked of them, and receive it at the next one: nobody waits for it. So
`Acceleration.cancel()` and `pipe._interrupt` may reach one rank only, and another thread may set them. What a callback
of the script sets counts at once, as in stock, so after each one the ranks do wait for each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.ledger import Ledger
from pipeboost.distributed import Mesh, checked_latents

_INTERRUPTED = Slot[bool](bool)


def agree_on_steps(scheduler: Any, ledger: Ledger) -> None:
    """Let the ranks of a call learn at each step whether one of them has failed or is to end it.

    After the first step of each new size of latents on a mesh they compare these; later calls do not wait.

    Raises:
        Cancelled: in a step, on all ranks alike.
        DisagreementError: in such a first step, on all ranks alike.
        RankFailedError: in a step, where another rank has failed.
    """
    ledger.share_middleware(scheduler, "step", _step, place="scheduler.agreement", kind="agreement at each step")


def agree_on_interrupts(pipe: Any, ledger: Ledger) -> None:
    """Make the `interrupt` that a script reads before each step the same on all ranks of a call."""
    if isinstance(getattr(type(pipe), "interrupt", None), property):
        ledger.add_middleware(pipe, "interrupt", _interrupt, place="pipe.parallel")


_FLAGS = Slot[Callable[[], tuple[bool, bool]]]()
"""Waits for what is under way between the ranks: whether one of them cancels, and whether one interrupts the call."""


def _step(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is None or call.mesh is None:
        return call_next(*args, **kwargs)
    call.mesh.watchdog.check()
    result = call_next(*args, **kwargs)
    latents = result[0] if call.step == 1 else None
    if isinstance(latents, torch.Tensor) and latents.shape not in call.mesh.compared:
        checked_latents(call.mesh, latents)
        call.mesh.compared.add(latents.shape)
    if not call.of_several_ranks:
        return result
    flags = call.pop(_FLAGS)
    if flags is not None:
        cancelled, interrupted = flags()
        if interrupted:
            call[_INTERRUPTED] = True
        if cancelled:
            raise call.cancelled()
    else:
        call.resources.callback(_receive_the_last, call)
    call[_FLAGS] = _send(call, call.mesh)
    return result


def _send(call: Call, mesh: Mesh) -> Callable[[], tuple[bool, bool]]:
    control = mesh.control
    own = torch.tensor([call.is_to_be_cancelled, bool(getattr(call.pipe, "_interrupt", False))])
    others = {rank: torch.zeros_like(own) for rank in range(control.size) if rank != control.rank}
    pending = control.exchange([(own, rank) for rank in others], [(each, rank) for rank, each in others.items()])

    def received() -> tuple[bool, bool]:
        pending.wait()
        cancelled, interrupted = torch.stack([own, *others.values()]).any(dim=0).tolist()
        return cancelled, interrupted

    return received


def _receive_the_last(call: Call) -> None:
    """Wait for what is under way when the call ends; a rank that ends at the same point has sent it."""
    flags = call.pop(_FLAGS)
    if flags is not None:
        with contextlib.suppress(Exception):  # another rank has failed, which the call raises
            flags()


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
