"""What the ranks run in `test_guiders` and `test_batched_branches`: guided calls, their samples counted."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipeboost import ParallelConfig, accelerate_pipeline
from tests.floors import floor_of, once
from tests.pipelines.tiny import TINY


def differences(name: str, change: Callable[[DiffusionPipeline], None] | None = None, **call: Any) -> dict[str, Any]:
    """One call on one rank, on all ranks of `cfg`, and stock again.

    Args:
        change: made to the pipeline once it was accelerated, as a user may.

    Returns:
        `"shared"`: largest difference of any output of ranks to one rank; `"removed"`: of stock after to stock before,
        for the pipeline's own call only;
        `"batches"`: the batch of each forward that this rank's transformer computed; `"size"`: of the largest value.
    """
    entry = TINY[name]
    pipe = entry.build()
    own = not call and change is None
    call["output_type"] = "latent"

    def run() -> tuple[torch.Tensor, ...]:
        # Z-Image's script writes into a list of prompts.
        output = pipe(**entry.call_kwargs(**copy.deepcopy(call)))
        return tuple(value for value in output.values() if isinstance(value, torch.Tensor))

    with torch.no_grad():
        accelerate_pipeline(pipe, attention=None, parallel=ParallelConfig(cfg=2), reuse=None)
        if change is not None:
            change(pipe)
        batches = counted(pipe.transformer)
        shared = run()
        computed = tuple(batches)
        with pipe.acceleration.paused():
            stock = run()
        pipe.acceleration.remove()
        after = run() if own else stock
    size = max(float(value.abs().max()) for value in stock)
    return {"shared": _largest(shared, stock), "removed": _largest(after, stock), "batches": computed, "size": size}


@once
def floor(name: str) -> float:
    """How far the order of sums alone moves any output of the pipeline's own call."""
    entry = TINY[name]
    pipe = entry.build()
    call = {"output_type": "latent"}
    return floor_of(lambda: list(pipe(**entry.call_kwargs(**call)).values()), pipe.transformer)


def in_double(pipe: DiffusionPipeline) -> None:
    """A change: the models compute in double precision."""
    pipe.to(torch.float64)


def forward_difference(name: str) -> tuple[float, float]:
    """Largest difference of one forward on all ranks of `cfg` to stock's, and how far rounding moves that."""
    entry = TINY[name]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)
    with torch.no_grad():
        stock = _flat(pipe.transformer(**copy.deepcopy(inputs)))
        floor = floor_of(lambda: pipe.transformer(**copy.deepcopy(inputs)), pipe.transformer)
        accelerate_pipeline(pipe, attention=None, parallel=ParallelConfig(cfg=2), reuse=None)
        with pipe.acceleration.open():
            shared = _flat(pipe.transformer(**copy.deepcopy(inputs)))
        pipe.acceleration.remove()
    return _largest(shared, stock), floor


def strides_of_two_branches(name: str) -> list[tuple[int, ...]]:
    """Of stock's prediction, and of those that this rank gets from a step's two calls."""
    entry = TINY[name]
    pipe = entry.build()
    inputs = {**entry.forward_inputs(pipe), "return_dict": False}
    with torch.no_grad():
        predictions = [pipe.transformer(**copy.deepcopy(inputs))[0]]
        accelerate_pipeline(pipe, attention=None, parallel=ParallelConfig(cfg=2), reuse=None)
        with pipe.acceleration.open():
            predictions += [pipe.transformer(**copy.deepcopy(inputs))[0] for _ in range(2)]
        pipe.acceleration.remove()
    assert all(torch.equal(prediction, predictions[0]) for prediction in predictions)
    return [each.stride() for each in map(torch.squeeze, predictions)]


def uncertain_batches() -> list[int]:
    """The batch that this rank computed of two samples, each time with an argument that may belong to one of them."""
    pipe = TINY["z_image"].build()
    inputs = TINY["z_image"].forward_inputs(pipe)
    other_sizes = {"x": [inputs["x"][0], inputs["x"][1][:, :, :4]]}
    with torch.no_grad():
        accelerate_pipeline(pipe, parallel=ParallelConfig(cfg=2), reuse=None)
        batches = counted(pipe.transformer)
        with pipe.acceleration.open():
            for odd in (
                {},
                other_sizes,
                {"t": inputs["t"][:1]},
                {"controlnet_block_samples": {0: torch.zeros(2, 1, 1)}},
            ):
                pipe.transformer(**{**inputs, **odd})
        pipe.acceleration.remove()
    return batches


def _flat(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(part for item in value for part in _flat(item))


def guided_by(guider: type, **settings: Any) -> Callable[[DiffusionPipeline], None]:
    """A change: another guider with settings of its own."""
    return functools.partial(_give_guider, guider=guider, settings=settings)


def _give_guider(pipe: DiffusionPipeline, *, guider: type, settings: dict[str, Any]) -> None:
    pipe.guider = guider(**settings)


def counted(model: torch.nn.Module) -> list[int]:
    """The batch of each forward from now on, noted inside everything of ours."""
    batches: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append(len(next(iter((*args, *kwargs.values())))))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return batches


def _largest(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> float:
    assert len(one) == len(other) > 0
    pairs = zip(one, other, strict=True)
    return max(float((mine.double() - its.double()).abs().max()) for mine, its in pairs)
