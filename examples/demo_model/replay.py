"""A training step as one CUDA graph: thousands of small kernels without a launch each."""

from collections.abc import Callable

import torch

WARM_UPS = 4


def replayed(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run `step` a few times, record it, and return what replays it; on a CPU return `step` itself.

    `step` must do the same work on the same tensors every time: it draws its batch with the device's random generator,
    takes the learning rate from a tensor, and its optimizer must be `capturable`.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"the step cannot be recorded, so it is launched kernel by kernel: {error}", flush=True)
        torch.cuda.synchronize()
        return step
    return graph.replay
