"""The first step of a new layout ends with a comparison: all ranks must have come to the same latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeboost.call import current_call
from pipeboost.distributed.agreement import checked_latents
from pipeboost.ledger import Ledger

# Outside what counts the steps, which has then counted this one.
_ORDER = -300.0


def check_first_step(scheduler: Any, ledger: Ledger) -> None:
    """Compare the ranks' latents after the first step of each new size of latents on a mesh; later calls do not wait.

    Raises:
        DisagreementError: in that step, on all ranks alike.
    """

    def apply(inner: Ledger) -> None:
        inner.add_layer(scheduler, "step", _step, order=_ORDER)

    ledger.share(scheduler, "first step", None, apply)


def _step(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    result = call_next(*args, **kwargs)
    call = current_call()
    if call is None or call.mesh is None or call.step != 1:
        return result
    latents = result[0]
    if isinstance(latents, torch.Tensor) and latents.shape not in call.mesh.compared:
        checked_latents(call.mesh, latents)
        call.mesh.compared.add(latents.shape)
    return result
