"""What the ranks run in `test_state`: changes of a pipeline that only one rank makes, then the others too."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler

from pipeboost import ParallelConfig, StageParallelism, accelerate_pipeline
from pipeboost.core.errors import RankFailedError
from pipeboost.distributed import DisagreementError
from tests.pipelines.tiny import TINY, lora_state_dict


class Change(NamedTuple):
    """What a user may do to a pipeline between two calls, how it is taken back, and whether stock can run it."""

    make: Callable[[Any], None]
    back: Callable[[Any], None] | None = None
    runs: bool = True


class Seen(NamedTuple):
    """What a rank saw of one change.

    Attributes:
        alone: the error where the last rank alone had it.
        back: difference to stock after that rank took it back; 0.0 where it cannot.
        all: difference to stock once all ranks had it.
    """

    alone: str
    back: float
    all: float


def _load(pipe: Any) -> None:
    pipe.load_lora_weights(lora_state_dict(TINY["flux_dev"].build().transformer, rank=4), adapter_name="a")


def _hotswap(pipe: Any) -> None:
    other = lora_state_dict(TINY["flux_dev"].build().transformer, rank=4, seed=1)
    pipe.load_lora_weights(other, adapter_name="a", hotswap=True)


def _from_config(pipe: Any, **settings: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)


@torch.no_grad()
def _add(module: torch.nn.Module, amount: float) -> None:
    module.bias.add_(amount)


def _scale_data(factor: float) -> Callable[[Any], None]:
    return lambda pipe: pipe.transformer.proj_out.weight.data.mul_(factor)


def _tile(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32


def _merge(pipe: Any) -> None:
    """As a library merges weights: no identity, no version changes."""
    for weight in pipe.transformer.parameters():
        weight.data.add_(0.01 * weight.data)


def _ip_scale(scale: float) -> Callable[[Any], None]:
    return lambda pipe: pipe.set_ip_adapter_scale(scale)


CHANGES: dict[str, Change] = {
    "load": Change(_load),
    "scale": Change(lambda pipe: pipe.set_adapters("a", 0.5), lambda pipe: pipe.set_adapters("a", 1.0)),
    "disable": Change(lambda pipe: pipe.disable_lora(), lambda pipe: pipe.enable_lora()),
    "enable": Change(lambda pipe: pipe.enable_lora()),
    "hotswap": Change(_hotswap),
    "fuse": Change(lambda pipe: pipe.fuse_lora()),
    "unfuse": Change(lambda pipe: pipe.unfuse_lora()),
    "unload": Change(lambda pipe: pipe.unload_lora_weights()),
    "scheduler": Change(lambda pipe: _from_config(pipe, base_shift=2.0, max_shift=3.0)),
    "scheduler class": Change(lambda pipe: setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))),
    "flow shift": Change(lambda pipe: _from_config(pipe, flow_shift=7.0)),
    "set_shift": Change(lambda pipe: pipe.scheduler.set_shift(5.0), lambda pipe: pipe.scheduler.set_shift(3.0)),
    "data": Change(_scale_data(2.0), _scale_data(0.5)),
    "merge": Change(_merge),
    "weights": Change(lambda pipe: _add(pipe.transformer.x_embedder, 0.1)),
    "vae weights": Change(lambda pipe: _add(pipe.vae.decoder.conv_out, 0.5)),
    "dtype": Change(lambda pipe: pipe.to(torch.float64), lambda pipe: pipe.to(torch.float32)),
    "vae dtype": Change(lambda pipe: pipe.vae.double(), lambda pipe: pipe.vae.float(), runs=False),
    "tiling": Change(_tile, lambda pipe: pipe.vae.disable_tiling()),
    "tile size": Change(lambda pipe: setattr(pipe.vae, "tile_overlap_factor", 0.5)),
    "tiling off": Change(lambda pipe: pipe.vae.disable_tiling()),
    "slicing": Change(lambda pipe: pipe.vae.enable_slicing(), lambda pipe: pipe.vae.disable_slicing()),
    "boundary": Change(lambda pipe: pipe.register_to_config(boundary_ratio=0.2)),
    "ip scale": Change(_ip_scale(0.3), _ip_scale(0.8)),
}


def changes(name: str, layout: Mapping[str, Any], kinds: Sequence[str], *, called_before: bool = True) -> list[Seen]:
    """Each change in turn: made by the last rank alone, taken back where it can be, then made by all."""
    entry, output_type = TINY[name], output_of(kinds)
    stock, pipe = entry.build(), entry.build()
    last = dist.get_rank() == dist.get_world_size() - 1

    def run(pipe: Any) -> torch.Tensor:
        return entry.call(pipe, steps=1, output_type=output_type)

    def of_stock() -> torch.Tensor:
        found = [torch.empty(0) if dist.get_rank() else run(stock)]
        dist.broadcast_object_list(found)
        return found[0]

    def difference() -> float:
        return float((run(pipe) - expected).abs().max())

    seen, expected = [], of_stock()
    with torch.no_grad():
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout, timeout=60), reuse=None)
        if called_before:
            run(pipe)
        for kind in kinds:
            change, back = CHANGES[kind], 0.0
            if last:
                change.make(pipe)
            alone = refused(lambda: run(pipe))
            if change.back is not None:
                if last:
                    change.back(pipe)
                back = difference()
            if change.runs:
                if not last or change.back is not None:
                    change.make(pipe)
                change.make(stock)
                expected = of_stock()
            seen.append(Seen(alone, back, difference()))
        pipe.acceleration.remove()
    return seen


def output_of(kinds: Sequence[str]) -> str:
    """The kind of output that shows changes: latents, where none is of the VAE."""
    return "pt" if "slicing" in kinds else "latent"


def refused(call: Callable[[], Any]) -> str:
    """The sentence that refuses a call; empty where it is not."""
    try:
        call()
    except DisagreementError as error:
        return str(error)
    return ""


def other_places() -> list[str]:
    """What is said where ranks differ in `open()`, in an encoder of the main rank alone, one of all, and the VAE."""
    entry = TINY["flux_dev"]
    pipe = entry.build()
    rank = dist.get_rank()
    with torch.no_grad():
        accelerate_pipeline(pipe, parallel=ParallelConfig(ulysses=2), reuse=None)
        _scale_data(1.0 + rank)(pipe)
        inputs = entry.forward_inputs(entry.build())

        def opened() -> None:
            with pipe.acceleration.open():
                pipe.transformer(**inputs)

        found = [refused(opened)]
        _scale_data(1.0 / (1.0 + rank))(pipe)
        encoder = next(pipe.text_encoder.parameters())
        encoder.mul_(1.0 + rank)
        found.append(refused(lambda: entry.call(pipe)))
        pipe.acceleration.stages["text encoding"].parallelism = StageParallelism.REPLICATED
        found.append(refused(lambda: entry.call(pipe)))
        encoder.div_(1.0 + rank)
        pipe.acceleration.stages["decoding"].parallelism = StageParallelism.MAIN_RANK
        if rank == 0:
            pipe.vae.enable_slicing()
        found.append(refused(lambda: entry.call(pipe)))
        pipe.acceleration.remove()
    return found


def after_a_failure() -> float:
    """Difference to stock of a call after one that has ended on one rank in the middle of its loop."""
    entry = TINY["wan21_t2v"]
    pipe = entry.build()
    with torch.no_grad():
        stock = entry.call(entry.build())
        accelerate_pipeline(pipe, parallel=ParallelConfig(cfg=2, timeout=60), reuse=None)

        def end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == 0 and dist.get_rank() == 1:
                raise ValueError("enough")
            return values

        try:
            entry.call(pipe, callback_on_step_end=end)
        except (ValueError, RankFailedError):
            accelerate_pipeline(pipe, parallel=ParallelConfig(cfg=2, timeout=60), reuse=None)
        ours = entry.call(pipe)
        pipe.acceleration.remove()
    return float((ours - stock).abs().max())
