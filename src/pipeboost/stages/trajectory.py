"""The latents and timesteps of every denoising step, for `pipe(..., return_trajectory=True)`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeboost.contract.call import Call, Slot
from pipeboost.stages.by_name import named_results

_ARGUMENT = "return_trajectory"


@dataclass
class Trajectory:
    """What a denoising loop went through.

    Attributes:
        timesteps: the timestep of each step.
        latents: the latents after each step, in the layout of the pipeline's loop, on its device.
    """

    timesteps: list[Any] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)


TRAJECTORY = Slot[Trajectory]()


def without_trajectory(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A call's arguments without the one that is ours, and what that said; a pipeline that has one keeps it."""
    rest = dict(kwargs)
    return rest, _ARGUMENT not in signature.parameters and rest.pop(_ARGUMENT, False)


def note_step(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Note one `scheduler.step(model_output, timestep, sample)` and what it returned, if the call asks for it."""
    trajectory = call.get(TRAJECTORY)
    if trajectory is None:
        return
    trajectory.timesteps.append(kwargs["timestep"] if "timestep" in kwargs else args[1])
    latents = next(iter(named_results(result, ("latents",)).values()))
    trajectory.latents.append(latents.detach().clone())


def with_trajectory(result: Any, trajectory: Trajectory | None) -> Any:
    """Return a pipeline's result with its trajectory: an attribute of an output, one more element of a tuple."""
    if trajectory is None:
        return result
    if isinstance(result, tuple):
        return (*result, trajectory)
    result.trajectory = trajectory
    return result
