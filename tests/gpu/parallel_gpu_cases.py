"""What the ranks run in `test_parallel_gpu`, each on a GPU of its own."""

import contextlib
import copy
import faulthandler
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from pipeboost import CompileConfig, ParallelConfig, accelerate_pipeline
from pipeboost.distributed import local_device, world
from pipeboost.distributed.collectives import symmetric_connect
from pipeboost.features.parallel import ulysses_ring
from tests.distributed import failing_pipeline_cases
from tests.pipelines.tiny import OTHER_PROMPT, TINY, load_tiny_lora


@contextlib.contextmanager
def in_two_parts(wanted: bool) -> Iterator[None]:
    """Inside, heads are exchanged in two parts where there are two, as in models that fill a GPU."""
    given = ulysses_ring._parts
    if wanted:
        ulysses_ring._parts = lambda batch, tokens, heads, *_, launched: min(heads, 2)
    try:
        yield
    finally:
        ulysses_ring._parts = given


def layouts(name: str, degrees: list[Mapping[str, int]], parts: bool = False) -> list[dict[str, Any]]:
    """In each layout, largest differences of final latents; with `parts`, heads are exchanged in two.

    Returns:
        For each layout, `"shared"`: to one GPU; `"graphs"`, `"graphs, other prompt"`: of replayed CUDA graphs to the
        same layout without; `"replayed"`: forwards that were; `"carrier"`: what the report says carries heads and
        tokens; `"removed"`: of stock to stock.
    """
    device = _exact_device()
    entry = TINY[name]
    pipe = entry.build().to(device)
    found = []
    with torch.no_grad(), in_two_parts(parts):
        stock = entry.call(pipe, output_type="latent")
        for layout in degrees:
            common = {"parallel": ParallelConfig(**layout), "reuse": None}
            accelerate_pipeline(pipe, compile=None, **common)
            shared, other = (entry.call(pipe, output_type="latent", **more) for more in ({}, {"prompt": OTHER_PROMPT}))
            accelerate_pipeline(pipe, compile=CompileConfig(scope=None, graphs=True), **common)
            for _ in range(2):  # runs them eagerly, captures them
                entry.call(pipe, output_type="latent")
                entry.call(pipe, output_type="latent", prompt=OTHER_PROMPT)
            replayed = _replayed(pipe)
            again = entry.call(pipe, output_type="latent")
            other_again = entry.call(pipe, output_type="latent", prompt=OTHER_PROMPT)
            replayed, carrier = _replayed(pipe) - replayed, pipe.acceleration.report().ulysses
            pipe.acceleration.remove()
            found.append(
                {
                    "shared": _difference(shared, stock),
                    "graphs": _difference(again, shared),
                    "graphs, other prompt": _difference(other_again, other),
                    "replayed": replayed,
                    "carrier": carrier,
                    "removed": _difference(entry.call(pipe, output_type="latent"), stock),
                }
            )
    return found


def compiled(name: str, degrees: Mapping[str, int]) -> dict[str, float]:
    """Compiled by inductor, with and without CUDA graphs: largest differences to one GPU."""
    device = _exact_device()
    entry = TINY[name]
    pipe = entry.build().to(device)
    with torch.no_grad():
        stock = entry.call(pipe, output_type="latent")
        found = {}
        for graphs in (False, True):
            config = CompileConfig(graphs=graphs)
            accelerate_pipeline(pipe, compile=config, parallel=ParallelConfig(**degrees), reuse=None)
            for _ in range(3):
                output = entry.call(pipe, output_type="latent")
            found[f"graphs={graphs}"] = _difference(output, stock)
            pipe.acceleration.remove()
    return found


def adapters(degrees: Mapping[str, int]) -> dict[str, Any]:
    """A LoRA whose weight changes between calls that replay graphs with transfers.

    Returns:
        `"differences"`: to one GPU, after each change; `"apart"`: of one change's latents to those before it;
        `"dropped"`, `"replayed"`: graphs.
    """
    device = _exact_device()
    entry = TINY["flux_dev"]
    pipe = entry.build().to(device)
    load_tiny_lora(pipe)
    twin = copy.deepcopy(pipe)
    graphs = CompileConfig(scope=None, graphs=True)
    accelerate_pipeline(pipe, parallel=ParallelConfig(**degrees), compile=graphs, reuse=None)
    changes: list[Callable[[Any], Any]] = [
        lambda pipe: pipe.set_adapters(["tiny"], [1.0]),
        lambda pipe: pipe.set_adapters(["tiny"], [0.25]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    latents, differences = [], []
    with torch.no_grad():
        for change in changes:
            change(pipe)
            change(twin)
            for _ in range(2):
                latents.append(entry.call(pipe, steps=4, output_type="latent"))
            differences.append(_difference(latents[-1], entry.call(twin, steps=4, output_type="latent")))
    counts = pipe.acceleration.report().graphs["transformer"]
    pipe.acceleration.remove()
    apart = [_difference(one, other) for one, other in itertools.pairwise(latents[1::2])]
    return {"differences": differences, "apart": apart, **{key: counts[key] for key in ("dropped", "replayed")}}


def memory_that_stays(name: str, degrees: Mapping[str, int]) -> dict[str, list[int]]:
    """Accelerated, called and made stock again, three times over.

    Returns:
        After each time, bytes: `"allocated"` of torch, beyond those before the first; `"used"` of the whole GPU.
    """
    device = _exact_device()
    pipe = TINY[name].build().to(device)
    found: dict[str, list[int]] = {"allocated": [], "used": []}
    with torch.no_grad():
        TINY[name].call(pipe)
        before = torch.cuda.memory_allocated(device)
        for _ in range(3):
            graphs = CompileConfig(scope=None, graphs=True)
            accelerate_pipeline(pipe, parallel=ParallelConfig(**degrees), compile=graphs, reuse=None)
            for _ in range(3):
                TINY[name].call(pipe)
            pipe.acceleration.remove()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.synchronize(device)
            found["allocated"].append(torch.cuda.memory_allocated(device) - before)
            free, total = torch.cuda.mem_get_info(device)
            found["used"].append(total - free)
    return found


def after_unequal_pasts(name: str) -> dict[str, Any]:
    """Heads are shared after the first rank, and no other, has mapped memory in a group of its own.

    Returns:
        `"shared"`: largest difference of the latents to one GPU; `"carrier"`: as the report tells it.
    """
    device = _exact_device()
    entry = TINY[name]
    pipe = entry.build().to(device)
    if world().rank == 0:
        alone: Any = SimpleNamespace(name="a group of the first rank alone", rank=0, size=1)
        with symmetric_connect._registered(alone, "peers 0") as registered:
            symmetric_connect._addresses(symmetric_connect._room(2**20, device, registered))
    with torch.no_grad():
        stock = entry.call(pipe, output_type="latent")
        layout = ParallelConfig(ulysses=world().size)
        accelerate_pipeline(pipe, compile=None, parallel=layout, reuse=None)
        shared, carrier = entry.call(pipe, output_type="latent"), pipe.acceleration.report().ulysses
        pipe.acceleration.remove()
    return {"shared": _difference(shared, stock), "carrier": carrier}


def failing_calls(name: str, kind: str, rank: int, stage: str) -> dict[str, Any]:
    """`failing_pipeline_cases.failing_calls`, on the GPUs, which share the tokens; one that hangs shows where."""
    faulthandler.dump_traceback_later(75)
    return failing_pipeline_cases.failing_calls(name, kind, rank, stage, str(_exact_device()), "ulysses")


def _exact_device() -> torch.device:
    device = local_device()
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def _replayed(pipe: Any) -> int:
    return sum(counts["replayed"] for counts in pipe.acceleration.report().graphs.values())


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
