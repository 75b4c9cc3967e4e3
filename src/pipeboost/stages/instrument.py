"""Middleware on a pipeline's methods: stages begin and end there, steps are counted, cancellation is obeyed.

It changes no value unless the user put a stage of their own there. For `pipe(..., return_trajectory=True)` it keeps the
latents and timesteps of every denoising step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.stages.by_name import ResultForm, named_results
from pipeboost.stages.call_record import ADMISSION
from pipeboost.stages.composition import STAGES
from pipeboost.stages.spans import DENOISING, RECORDER, WAITING, Recorder
from pipeboost.stages.stage import Values
from pipeboost.stages.stage_middleware import middleware_of_stage, run_user_stage

_ARGUMENT = "return_trajectory"
COMPANIONS = ("controlnet",)
"""Components that a denoising step calls before the transformer, so that the step begins with them."""


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


def instrumented_components(pipe: Any, family: Family) -> dict[str, Any]:
    """Return the objects that `instrument_component` takes, by path; the pipeline's own is empty."""
    paths = dict.fromkeys((*(door.component for door in family.doors), "scheduler", *COMPANIONS))
    found = {path: pipe if not path else getattr(pipe, path, None) for path in paths}
    return {path: obj for path, obj in {**found, **family.models(pipe)}.items() if obj is not None}


def instrument_component(path: str, obj: Any, family: Family, ledger: Ledger) -> None:
    """Put the middleware on one object; pipelines that share it share the middleware."""
    doors = tuple(door for door in family.doors if door.component == path)
    middleware = [(door.method, middleware_of_stage(door)) for door in doors]
    if path in family.denoisers:
        middleware.append(("__call__", _denoise))
    elif path in COMPANIONS:
        middleware.append(("__call__", _accompany))
    if path == "scheduler":
        middleware.append(("step", _advance))

    kind = "scheduler" if path == "scheduler" else "component" if path else "pipe"

    def apply(inner: Ledger) -> None:
        for method, each in middleware:
            if callable(getattr(obj, method, None)):
                inner.add_middleware(obj, method, each, place=f"{kind}.stages")

    ledger.share(obj, "watch", (path, doors), apply)


def _accompany(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is None:
        return call_next(*args, **kwargs)
    with _begin_step(call).span(DENOISING, "forward", step=call.step):
        return call_next(*args, **kwargs)


def _denoise(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is None:
        return call_next(*args, **kwargs)
    recorder = _begin_step(call)
    call.follow_scheduler()
    call.branch += 1
    with recorder.span(DENOISING, "forward", step=call.step, branch=call.branch):
        return call_next(*args, **kwargs)


def _begin_step(call: Call) -> Recorder:
    call.raise_if_cancelled()
    recorder = call[RECORDER]
    if recorder.current_step() is None:
        admission = call.get(ADMISSION)
        if admission is not None and call.step == 0:
            with recorder.span(WAITING):
                admission.begin()
                call.raise_if_cancelled()  # it may have waited long
        recorder.open(DENOISING, "step", step=call.step)
    return recorder


def _advance(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is None:
        return call_next(*args, **kwargs)
    recorder = call[RECORDER]
    with recorder.span(DENOISING, "scheduler", step=call.step):
        result = call_next(*args, **kwargs)
    note_step(call, args, kwargs, result)
    step = recorder.current_step()
    if step is not None:
        recorder.close(step)
    call.step += 1
    call.branch = -1
    recorder.notify(DENOISING, call.step)
    call.raise_if_cancelled()
    return _after_the_loop(call, result) if _was_last(call, owner) else result


def _after_the_loop(call: Call, result: Any) -> Any:
    admission, (stages, _) = call.get(ADMISSION), call[STAGES].users.get(DENOISING, ((), 0))
    if admission is not None:
        admission.end()
    if not stages:
        return result
    outputs = named_results(result, ("latents",))
    (name, latents), *_ = outputs.items()
    values: Values = {"latents": latents}
    for stage in stages[1:]:
        values, _ = run_user_stage(call, stage, values)
    return ResultForm.of(result, ("latents",)).filled({**outputs, name: values.get("latents")})


def _was_last(call: Call, scheduler: Any) -> bool:
    """Whether the scheduler has made the last of its steps; asked of host numbers alone."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return False
    index: int | None = getattr(scheduler, "step_index", None)
    return (call.step if index is None else index) >= len(timesteps)


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
