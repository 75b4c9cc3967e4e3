"""What the ranks run in `test_beside`: calls on a mesh with ranks beside it."""

from typing import Any

import torch
import torch.distributed as dist

from pipeboost import ParallelConfig, accelerate_pipeline
from tests.pipelines.tiny import TINY


def results(name: str, layout: dict[str, Any], *, quality: str = "exact", calls: int = 1, **settings: Any) -> dict:
    """What calls of a pipeline return on this rank, and what has worked here."""
    entry = TINY[name]
    pipe, worked = entry.build(), set()
    for component, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            hooked = module.decoder if component == "vae" else module
            hooked.register_forward_pre_hook(lambda *_, component=component: worked.add(component))
    accelerate_pipeline(pipe, quality=quality, parallel=ParallelConfig(**layout))
    with torch.no_grad():
        found = [entry.call(pipe, seed=seed, **settings) for seed in range(calls)]
    pipe.acceleration.remove()
    return {"results": found, "worked": worked, "rank": dist.get_rank()}
