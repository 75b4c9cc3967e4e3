"""One forward as a CUDA graph: rehearsed, captured, and replayed on fresh inputs.

Inputs are copied into memory of the graph and outputs out of it, so nobody outside ever holds what a replay overwrites.
All graphs of a device are captured on one stream and never run at the same time, whichever threads and streams ask for
them: they share memory, and the workspaces of cuBLAS belong to the stream that they were captured on.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pipeboost.distributed import suspend_timeout
from pipeboost.features.graphs.signature import NotCapturable, copied, exchanged

_ALIGNMENT = 16
_SYNCHRONISES = "synchronizing CUDA operation"
# What torch leaves undone when a capture fails: its allocator and random numbers before 2.12, its pool in all we know.
_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
_LEFT_IN_CAPTURE = _TORCH < (2, 12)
_LEFT_WITH_POOL = _TORCH < (2, 14)


class _Device:
    """What the graphs of one device share."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.stream = torch.cuda.Stream(device)
        self.latest = torch.cuda.Event()


_devices: dict[torch.device, _Device] = {}
_devices_lock = threading.Lock()


def _shared(device: torch.device) -> _Device:
    with _devices_lock:
        if device not in _devices:
            _devices[device] = _Device(device)
        return _devices[device]


class Inputs:
    """Memory for the tensors among the arguments of a forward, which keeps their strides.

    Args:
        tensors: as `read` found them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # Along a dimension of stride 0 there is one entry to write, however long it seems.
        self._entries = [
            tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride()) for tensor in tensors
        ]
        self.tensors = [
            torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            for tensor in tensors
        ]
        self._written = [tensor[entry] for tensor, entry in zip(self.tensors, self._entries, strict=True)]
        self.fill(tensors)

    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the numbers of other tensors of the same signature into them."""
        for target, tensor, entry in zip(self._written, tensors, self._entries, strict=True):
            target.copy_(tensor[entry])

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)


class CapturedForward:
    """A graph with its inputs and output.

    Attributes:
        nbytes: what it added to the memory that torch holds: inputs and, where the pool had to grow, activations.
    """

    def __init__(
        self, device: torch.device, graph: torch.cuda.CUDAGraph, inputs: Inputs, output: Any, nbytes: int
    ) -> None:
        self.nbytes = nbytes
        self._device = device
        self._graph = graph
        self._inputs = inputs
        self._output = output

    def replay(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The forward of other tensors of the same signature, on the current stream; returns tensors of its own."""
        shared = _shared(self._device)
        stream = torch.cuda.current_stream(self._device)
        with shared.lock:
            stream.wait_event(shared.latest)
            self._inputs.fill(tensors)
            self._graph.replay()
            output = copied(self._output)
            shared.latest.record(stream)
        return output

    def close(self) -> None:
        """Free its memory, once it has run for the last time."""
        with _shared(self._device).lock:
            _shared(self._device).latest.synchronize()
            self._graph.reset()
            self._output = None


def aligned(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors lie as those of a graph do: kernels are chosen by it.

    A tensor that is one number, such as a timestep out of the schedule's, is read alike wherever it lies.
    """
    return all(tensor.data_ptr() % _ALIGNMENT == 0 or _is_one_number(tensor) for tensor in tensors)


def _is_one_number(tensor: torch.Tensor) -> bool:
    return all(size == 1 or step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def new_pool() -> Any:
    """Memory for graphs that never run at the same time."""
    return torch.cuda.graph_pool_handle()


def capture(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    pool: Any,
) -> tuple[Any, CapturedForward | NotCapturable]:
    """Run a forward once, and capture it for the next time. No other thread may be using torch meanwhile.

    The run is a rehearsal on the graph's stream and inputs, in which whatever waits for the device raises: in a capture
    it would do so too late to mend. Only then is the forward captured, which computes nothing.

    Returns:
        What the forward returned, and its graph, or why there is none. The first is None where the rehearsal already
        showed that there can be none.
    """
    shared, current = _shared(device), torch.cuda.current_stream(device)
    with shared.lock:
        current.wait_event(shared.latest)
        inputs = Inputs(tensors)
        try:
            own_args, own_kwargs = exchanged(args, kwargs, tensors, inputs.tensors)
            rehearsed = _rehearse(run, own_args, own_kwargs, shared.stream, current)
            result = copied(rehearsed)
        except NotCapturable as reason:
            return None, reason
        # Its memory goes back to the graph's stream, which must not write there before it was read.
        shared.stream.wait_stream(current)
        del rehearsed
        inputs.fill(tensors)
        try:
            return result, _captured(run, own_args, own_kwargs, inputs, shared.stream, device, pool)
        except NotCapturable as reason:
            return result, reason
        finally:
            shared.latest.record(current)


def _rehearse(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stream: torch.cuda.Stream,
    current: torch.cuda.Stream,
) -> Any:
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream), _waiting_raises():
            return run(*args, **kwargs)
    except RuntimeError as error:
        if _SYNCHRONISES not in str(error):
            raise
        raise NotCapturable(
            "its forward waits for the device, to read a value back or to copy one from the host"
        ) from error
    finally:
        current.wait_stream(stream)


@contextlib.contextmanager
def _waiting_raises() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _captured(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Inputs,
    stream: torch.cuda.Stream,
    device: torch.device,
    pool: Any,
) -> CapturedForward:
    torch.cuda.synchronize(device)
    # What the rehearsal left in the allocator's hands is what the graph is about to ask for.
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    graph = torch.cuda.CUDAGraph()
    failure: BaseException | None = None
    output: Any = None
    with suspend_timeout("capturing"), _no_collection(), torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            output = run(*args, **kwargs)
        except BaseException as error:
            failure = error
        try:
            graph.capture_end()
        except RuntimeError as error:
            failure = failure or error
            _give_up(device, pool)
    if failure is None:
        nbytes = torch.cuda.memory_reserved(device) - before + inputs.nbytes
        return CapturedForward(device, graph, inputs, output, nbytes)
    if not isinstance(failure, Exception):
        raise failure
    reason = (str(failure).splitlines() or [type(failure).__name__])[0]
    raise NotCapturable(f"its capture failed: {reason}") from failure


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, no garbage is collected: among it may be what only a device that is not capturing can free."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _give_up(device: torch.device, pool: Any) -> None:
    """Do what torch leaves undone after a capture that failed, without which later allocations and noise fail."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if _LEFT_IN_CAPTURE:
        torch._C._cuda_endAllocateToPool(index, pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
    if _LEFT_WITH_POOL:
        torch._C._cuda_releasePool(index, pool)
