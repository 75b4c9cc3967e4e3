"""At each step a rank looks whether the others still run; the first one of a new layout ends with a comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeboost.contract.call import current_call
from pipeboost.core.ledger import Ledger
from pipeboost.distributed.agreement.arguments import checked_latents


def check_latents(scheduler: Any, ledger: Ledger) -> None:
    """Compare the ranks' latents after the first step of each new size of latents on a mesh; later calls do not wait.

    Raises:
        RankFailedError: in a step, where another rank has failed.
        DisagreementError: in that step, on all ranks alike.
    """
    ledger.share_middleware(scheduler, "step", _step, place="scheduler.latents", kind="first step")


def _step(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is not None and call.mesh is not None:
        call.mesh.watchdog.check()
    result = call_next(*args, **kwargs)
    if call is None or call.mesh is None or call.step != 1:
        return result
    latents = result[0]
    if isinstance(latents, torch.Tensor) and latents.shape not in call.mesh.compared:
        checked_latents(call.mesh, latents)
        call.mesh.compared.add(latents.shape)
    return result
