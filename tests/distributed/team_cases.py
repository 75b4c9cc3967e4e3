"""What the ranks run in `test_team`: what ranks that form a team must know of each other, and what they leave."""

import copy
import gc
import unittest.mock
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from pipeboost import Stage, accelerate_pipeline
from pipeboost.contract.call import open_call
from pipeboost.contract.registry import family_of
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.distributed import DisagreementError, Mesh, checked_latents
from pipeboost.distributed.collectives import groups as groups_module
from pipeboost.features.parallel.cfg_parallel import share_branches
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


def progress_of_a_copy(name: str, /, **layout: Any) -> list[bool]:
    """Whether the progress bar of a `copy.copy` is hidden, while the pipeline is accelerated and after `remove()`."""
    pipe = TINY[name].build()
    vars(pipe).pop("_progress_bar_config", None)
    accelerate_pipeline(pipe, parallel=ParallelConfig(**layout))
    view = copy.copy(pipe)
    # Where torch.distributed runs, Diffusers itself hides all bars but that of rank 0.
    with unittest.mock.patch("diffusers.pipelines.pipeline_utils.is_torch_dist_rank_zero", return_value=True):
        during = view.progress_bar(total=1).disable
        pipe.acceleration.remove()
        return [during, view.progress_bar(total=1).disable]


class Forwards(PipelineCallback):
    """A callback of Diffusers' kind that runs the denoiser, and keeps in itself what came out."""

    tensor_inputs = ["latents"]  # noqa: RUF012 - as Diffusers has it

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs
        self.count = 0
        self.seen: list[torch.Tensor] = []

    def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]) -> Any:
        self.count += 1
        self.seen.append(pipeline.transformer(**copy.deepcopy(self.inputs))[0].clone())
        return callback_kwargs


class ForwardStage(Stage):
    """A stage of the user's that runs the denoiser."""

    def __init__(self, pipe: Any, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.pipe = pipe
        self.inputs = inputs
        self.seen: list[torch.Tensor] = []

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(self.pipe.transformer(**copy.deepcopy(self.inputs))[0].clone())
        return values


def differences_with_a_callback_of_diffusers(name: str, several: bool, /, **layout: Any) -> list[float]:
    """As `callback_differences`, with a callback that has Diffusers' class, or several of them in one."""
    entry = TINY[name]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)

    def run() -> list[torch.Tensor]:
        callback = Forwards(inputs)
        given = MultiPipelineCallbacks([callback]) if several else callback
        latents = entry.call(pipe, output_type="latent", callback_on_step_end=given)
        assert callback.count == len(callback.seen) > 1
        return [latents, *callback.seen]

    with torch.no_grad():
        stock = run()
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout))
        ours = run()
        pipe.acceleration.remove()
    return [float((ours - stock).abs().max()) for ours, stock in zip(ours, stock, strict=True)]


def differences_with_stages_that_run_the_denoiser(name: str, /, **layout: Any) -> list[float]:
    """Largest differences to stock's of the latents, and of what each stage saw, around the denoising."""
    entry = TINY[name]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)
    with torch.no_grad():
        expected = pipe.transformer(**copy.deepcopy(inputs))[0]
        stock = entry.call(pipe, output_type="latent")
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout))
        before, after = ForwardStage(pipe, inputs), ForwardStage(pipe, inputs)
        pipe.acceleration.add_stage("one", before, after="text encoding")
        pipe.acceleration.add_stage("two", after, after="denoising")
        ours = entry.call(pipe, output_type="latent")
        pipe.acceleration.remove()
    seen = [*before.seen, *after.seen]
    assert len(seen) > 1
    return [float((ours - stock).abs().max()), *(float((each - expected).abs().max()) for each in seen)]


def early_reading() -> dict[str, Any]:
    """Two forwards of a step, of which the script reads the first before it makes the second."""
    entry = TINY["flux_true_cfg"]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)
    with torch.no_grad():
        stock = pipe.transformer(**copy.deepcopy(inputs))[0]
        mesh, ledger = Mesh({"cfg": 2}, device=torch.device("cpu")), Ledger()
        share_branches(pipe.transformer, family_of(pipe), ledger)
        with open_call(pipe, owner=None, mesh=mesh):
            first = pipe.transformer(**copy.deepcopy(inputs))[0]
            early = first + 0
            pipe.transformer(**copy.deepcopy(inputs))
        found = {"early": bool(early.isnan().all()), "filled": float((first - stock).abs().max()), "refused": ""}
        try:
            checked_latents(mesh, early)
        except DisagreementError as error:
            found["refused"] = str(error)
        ledger.undo()
        mesh.close()
    return found


def odd_prediction() -> str:
    """What a denoiser is told that computes in another dtype than its latents have."""
    entry = TINY["flux_true_cfg"]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)
    mesh, ledger = Mesh({"cfg": 2}, device=torch.device("cpu")), Ledger()
    share_branches(pipe.transformer, family_of(pipe), ledger)
    pipe.transformer.register_forward_hook(lambda _, args, output: (output[0].double(),))
    try:
        with torch.no_grad(), open_call(pipe, owner=None, mesh=mesh):
            for _ in range(2):
                pipe.transformer(**{**copy.deepcopy(inputs), "return_dict": False})
    except UnsupportedError as error:
        return str(error)
    finally:
        ledger.undo()
        mesh.close()
    return "accepted"


def refused_beside_another(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The sentence that refuses a pipeline which shares its transformer with one that is accelerated."""
    one = TINY[name].build()
    two = type(one)(**one.components)
    accelerate_pipeline(one, parallel=ParallelConfig(**first))
    try:
        accelerate_pipeline(two, parallel=ParallelConfig(**second))
    except UnsupportedError as error:
        return str(error)
    finally:
        one.acceleration.remove()
    return "accepted"
