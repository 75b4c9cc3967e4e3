"""What the ranks run in `test_stops`: one of them is to end a call early."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeboost import Cancelled, ParallelConfig, accelerate_pipeline
from pipeboost.distributed import DisagreementError
from tests.pipelines.tiny import TINY

STEPS = 6


def cancelled(name: str, rank: int, step: int, /, **layout: Any) -> dict[str, Any]:
    """One rank cancels a call at a step; what that raises, and how far the next call is from stock."""
    entry = TINY[name]
    pipe = entry.build()
    stock = _latents(entry, pipe)
    accelerate_pipeline(pipe, parallel=ParallelConfig(**layout, timeout=10.0))
    steps = _told_of_steps(pipe, rank, step, pipe.acceleration.cancel)
    try:
        first = _difference(_latents(entry, pipe), stock)
    except Cancelled as error:
        first = str(error)
    pipe.acceleration.progress = None
    second = _difference(_latents(entry, pipe), stock)
    pipe.acceleration.remove()
    return {"first": first, "steps": steps, "second": second}


def submitted(name: str, rank: int, /, **layout: Any) -> dict[str, Any]:
    """Four requests and a call, of which one rank cancels the second before it begins.

    The third one's prompt is another on each rank.

    Returns:
        `"found"`: the difference to stock of each, or what it raised; `"after"`: of a call after them.
    """
    entry = TINY[name]
    pipe = entry.build()
    stock = _latents(entry, pipe)
    accelerate_pipeline(pipe, parallel=ParallelConfig(**layout, timeout=10.0))
    call = {**entry.call_kwargs(steps=STEPS), "output_type": "latent"}
    prompts = {2: {"prompt": f"rank {dist.get_rank()}"}}

    def request(number: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe.acceleration.submit(**{**call, "generator": generator, **prompts.get(number, {})})

    requests = [request(number) for number in range(4)]
    if dist.get_rank() == rank:
        requests[1].cancel()
    after = _difference(_latents(entry, pipe), stock)
    found = []
    for each in requests:
        try:
            found.append(_difference(each.result(60.0)[0], stock))
        except (Cancelled, DisagreementError) as error:
            found.append(type(error).__name__)
    pipe.acceleration.remove()
    return {"found": found, "after": after}


def _told_of_steps(pipe: Any, rank: int, step: int, then: Callable[[], None]) -> list[int]:
    """The steps that calls of the pipeline come to; one rank does something at one of them."""
    steps: list[int] = []

    def told(progress: Any) -> None:
        if progress.step is not None:
            steps.append(progress.step)
        if progress.step == step and dist.get_rank() == rank:
            then()

    pipe.acceleration.progress = told
    return steps


def interrupted_by_a_callback(name: str, rank: int, step: int, /, **layout: Any) -> float:
    """One rank's callback interrupts the script after a step; the difference to stock where it does so."""
    entry = TINY[name]
    pipe = entry.build()

    def callback_for(ranks: tuple[int, ...]) -> Any:
        def callback(pipe: Any, at: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if at == step and dist.get_rank() in ranks:
                pipe._interrupt = True
            return values

        return callback

    stock = _latents(entry, pipe, callback_on_step_end=callback_for((0, 1)))
    accelerate_pipeline(pipe, parallel=ParallelConfig(**layout, timeout=10.0))
    ours = _latents(entry, pipe, callback_on_step_end=callback_for((rank,)))
    pipe.acceleration.remove()
    return _difference(ours, stock)


def interrupted_from_outside(name: str, rank: int, step: int, /, **layout: Any) -> dict[str, Any]:
    """Something that is no callback of the script interrupts it on one rank; latents, steps, and the next call."""
    entry = TINY[name]
    pipe = entry.build()
    stock = _latents(entry, pipe)
    accelerate_pipeline(pipe, parallel=ParallelConfig(**layout, timeout=10.0))
    steps = _told_of_steps(pipe, rank, step, lambda: setattr(pipe, "_interrupt", True))
    latents = _latents(entry, pipe)
    pipe.acceleration.progress = None
    second = _difference(_latents(entry, pipe), stock)
    pipe.acceleration.remove()
    return {"latents": latents, "steps": steps[-1], "second": second}


def _latents(entry: Any, pipe: Any, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return entry.call(pipe, steps=STEPS, output_type="latent", **settings)


def _difference(ours: torch.Tensor, stock: torch.Tensor) -> float:
    return float((ours - stock).abs().max())
