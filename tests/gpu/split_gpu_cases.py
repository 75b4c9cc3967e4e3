"""What the ranks run in `test_split_gpu`, each on a GPU of its own."""

from typing import Any

import torch

from pipeboost import ParallelConfig, accelerate_pipeline
from pipeboost.distributed import local_device
from pipeboost.features.parallel.rank_share import to_be_split
from tests.pipelines.tiny import TINY


def split_on_the_host(name: str, ranks: int) -> dict[str, Any]:
    """A pipeline whose transformer and encoders wait on the host until they are split, and one that was moved whole.

    Returns:
        `"difference"`: largest, of their latents; `"peak"`, `"peak, moved whole"`: bytes on this GPU while each was put
        there and accelerated; `"devices"`: of what had waited, while accelerated and after `remove()`; `"same"`:
        whether its weights are to the bit what they were.
    """
    device = local_device()
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    entry, layout = TINY[name], ParallelConfig(tensor=ranks)
    latents, peaks = [], []
    for waits in (True, False):
        pipe = entry.build()
        waiting = to_be_split(pipe, layout) if waits else ()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for component, module in pipe.components.items():
            if isinstance(module, torch.nn.Module) and component not in waiting:
                module.to(device)
        accelerate_pipeline(pipe, parallel=layout, compile=None, reuse=None)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        with torch.no_grad():
            latents.append(entry.call(pipe, output_type="latent"))
        if waits:
            during = {getattr(pipe, component).device.type for component in waiting}
            pipe.acceleration.remove()
            after = {getattr(pipe, component).device.type for component in waiting}
            whole = entry.build()
            same = all(
                torch.equal(weight, expected)
                for component in waiting
                for weight, expected in zip(
                    getattr(pipe, component).parameters(), getattr(whole, component).parameters(), strict=True
                )
            )
        else:
            pipe.acceleration.remove()
        del pipe
    return {
        "difference": float((latents[0] - latents[1]).abs().max()),
        "peak": peaks[0],
        "peak, moved whole": peaks[1],
        "devices": (during, after),
        "same": same,
    }
