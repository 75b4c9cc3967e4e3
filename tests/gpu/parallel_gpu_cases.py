"""What the ranks run in `test_parallel_gpu`, each on a GPU of its own."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeboost import CompileConfig, ParallelConfig, accelerate_pipeline
from pipeboost.distributed import local_device
from tests.distributed import failing_pipeline_cases
from tests.pipelines.tiny import OTHER_PROMPT, TINY


def layouts(name: str, degrees: list[Mapping[str, int]]) -> list[dict[str, Any]]:
    """In each layout, largest differences of final latents.

    Returns:
        For each layout, `"shared"`: to one GPU; `"graphs"`, `"graphs, other prompt"`: of replayed CUDA graphs to the
        same layout without; `"replayed"`: forwards that were; `"carrier"`: what the report says carries heads and
        tokens; `"removed"`: of stock to stock.
    """
    device = _exact_device()
    entry = TINY[name]
    pipe = entry.build().to(device)
    found = []
    with torch.no_grad():
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


def failing_calls(name: str, kind: str, rank: int, stage: str) -> dict[str, Any]:
    """`failing_pipeline_cases.failing_calls`, on the GPUs, which share the tokens."""
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
