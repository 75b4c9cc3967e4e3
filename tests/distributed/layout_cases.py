"""What the ranks run in `test_layouts`: one tiny pipeline, on one rank and shared, and the difference."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeboost import ParallelConfig, accelerate_pipeline
from tests.pipelines.tiny import TINY


def difference(name: str, layout: Mapping[str, int], /, *, quality: str = "lossless", **overrides: Any) -> dict[str, Any]:
    """The largest difference of final latents between stock, shared and stock again."""
    entry = TINY[name]
    pipe = entry.build()
    settings = {"output_type": "latent", **overrides}
    with torch.no_grad():
        stock = entry.call(pipe, **settings)
        accelerate_pipeline(pipe, quality=quality, parallel=ParallelConfig(**layout), reuse=None)
        shared = entry.call(pipe, **settings)
        again = entry.call(pipe, **settings)
        pipe.acceleration.remove()
        after = entry.call(pipe, **settings)
    return {
        "shared": float((shared - stock).abs().max()),
        "again": float((again - shared).abs().max()),
        "removed": float((after - stock).abs().max()),
        "size": float(stock.abs().max()),
    }
