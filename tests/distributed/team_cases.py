"""What the ranks run in `test_team`: what ranks that form a team must know of each other, and what they leave."""

import copy
import gc
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from pipeboost import accelerate_pipeline
from pipeboost.config import ParallelConfig
from pipeboost.distributed import groups as groups_module
from tests.pipelines.tiny import TINY


def refused(name: str, *settings: Mapping[str, Any]) -> str:
    """The sentence that refuses ranks of which each has its own settings."""
    pipe = TINY[name].build()
    before = type(pipe), type(pipe.transformer)
    try:
        accelerate_pipeline(pipe, **settings[dist.get_rank()])
    except Exception as error:
        assert (type(pipe), type(pipe.transformer)) == before
        return f"{type(error).__name__}: {error}"
    pipe.acceleration.remove()
    return "accepted"


def opened_difference(name: str, /, **layout: Any) -> float:
    """Largest difference of one forward in `open()` to stock's."""
    entry = TINY[name]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)
    with torch.no_grad():
        stock = pipe.transformer(**copy.deepcopy(inputs))[0]
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout))
        with pipe.acceleration.open():
            ours = pipe.transformer(**copy.deepcopy(inputs))[0]
        pipe.acceleration.remove()
    return float((ours - stock).abs().max())


def callback_differences(name: str, /, **layout: Any) -> list[float]:
    """Largest differences to stock's of the latents, and of what forwards in a step's callback returned."""
    entry = TINY[name]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)

    def run() -> list[torch.Tensor]:
        seen = []

        def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            seen.append(pipe.transformer(**copy.deepcopy(inputs))[0].clone())
            return values

        latents = entry.call(pipe, output_type="latent", callback_on_step_end=callback)
        return [latents, *seen]

    with torch.no_grad():
        stock = run()
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout))
        ours = run()
        pipe.acceleration.remove()
    return [float((ours - stock).abs().max()) for ours, stock in zip(ours, stock, strict=True)]


def left_by_a_dropped_pipeline(name: str, /, **layout: Any) -> list[str]:
    """What is there after a pipeline was called and dropped, without `remove()`."""
    entry = TINY[name]
    pipe = entry.build()
    groups = set(groups_module._groups)
    with torch.no_grad():
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout))
        entry.call(pipe, output_type="latent")
    acceleration = weakref.ref(pipe.acceleration)
    del pipe
    gc.collect()
    return [*(set(groups_module._groups) - groups), *([] if acceleration() is None else ["acceleration"])]


def differences_of_two_pipelines_with_one_transformer(
    name: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[float]:
    """Largest differences of latents to stock: of the first, the second, it again once the first is removed, stock."""
    entry = TINY[name]
    one = entry.build()
    two = type(one)(**one.components)

    def run(pipe: Any) -> torch.Tensor:
        return entry.call(pipe, output_type="latent")

    with torch.no_grad():
        stock = run(one)
        accelerate_pipeline(one, parallel=ParallelConfig(**first))
        accelerate_pipeline(two, parallel=ParallelConfig(**second))
        ours = [run(one), run(two)]
        one.acceleration.remove()
        ours.append(run(two))
        two.acceleration.remove()
        ours.append(run(two))
    return [float((latents - stock).abs().max()) for latents in ours]


def progress_of_a_copy(name: str, /, **layout: Any) -> list[dict[str, Any]]:
    """The settings of the progress bar of a `copy.copy`, while the pipeline is accelerated and after `remove()`."""
    pipe = TINY[name].build()
    vars(pipe).pop("_progress_bar_config", None)
    accelerate_pipeline(pipe, parallel=ParallelConfig(**layout))
    view = copy.copy(pipe)
    during = dict(getattr(view, "_progress_bar_config", {}))
    pipe.acceleration.remove()
    return [during, dict(getattr(view, "_progress_bar_config", {}))]
