"""`Trajectory`: what the scheduler read and wrote in each step of a call, of some of the latents' elements."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipeboost.core.ledger import Ledger

_ELEMENTS = 2048
"""Of the latents that are recorded: the same ones in every call, drawn at random."""


@dataclass
class Trajectory:
    """One call, in float32 on the host.

    Attributes:
        predictions: `(steps, elements)`, what the steps were given: the denoiser's output, guidance included.
        latents: `(steps + 1, elements)`, before each step and after the last.
    """

    predictions: torch.Tensor
    latents: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """How far each step moves the latents for one unit of its prediction, `(steps,)`.

        Exact for Euler's method; of methods that look back at earlier predictions it is the part along the latest.
        """
        moves = self.latents[1:] - self.latents[:-1]
        return (moves * self.predictions).sum(1) / self.predictions.pow(2).sum(1).clamp_min(1e-30)


@contextlib.contextmanager
def recorded(pipe: Any) -> Iterator[Callable[[], Trajectory]]:
    """Inside, calls are recorded; what this yields returns the latest of them."""
    predictions: list[torch.Tensor] = []
    latents: list[torch.Tensor] = []

    def begin(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        predictions.clear()
        latents.clear()
        return call_next(*args, **kwargs)

    def record(call_next: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(("model_output", "timestep", "sample"), args, strict=False)), **kwargs}
        result = call_next(*args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        if not latents:
            latents.append(_some(given["sample"]))
        predictions.append(_some(given["model_output"]))
        latents.append(_some(after))
        return result

    with Ledger() as ledger:
        ledger.add_middleware(pipe, "__call__", begin, place="pipe.tune")
        ledger.add_middleware(pipe.scheduler, "step", record, place="scheduler.tune")
    try:
        yield lambda: Trajectory(torch.stack(predictions), torch.stack(latents))
    finally:
        ledger.undo()


def _some(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    drawn = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))[:_ELEMENTS]
    return flat[drawn.to(flat.device)].float().cpu()
