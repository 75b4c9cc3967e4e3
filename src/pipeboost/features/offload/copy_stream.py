"""`CopyStream`: copies from host to device, on CUDA in a stream of their own that overlaps the computation."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from pipeboost.contract.call import Slot, current_call

MOVES = Slot[list[tuple[float, int]]](list)
"""When copies were sent in a call, by `time.perf_counter`, and their bytes."""


class Arrival:
    """Copies that were queued."""

    def __init__(self, device: torch.device, events: tuple[Any, Any] | None, seconds: float) -> None:
        self._device = device
        self._events = events
        self._seconds = seconds

    def wait(self) -> None:
        """Make the current stream wait for the copies; the host goes on."""
        if self._events is not None:
            torch.cuda.current_stream(self._device).wait_event(self._events[1])

    def finish(self) -> float:
        """Block the host until the copies are done, and return how many seconds they took."""
        if self._events is None:
            return self._seconds
        start, end = self._events
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class CopyStream:
    """Sends host memory to one device. On a CPU the copies are made at once, into memory of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, nbytes: int) -> torch.Tensor:
        """Allocate bytes on the device for the current stream, which must be the one that computes with them."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def send(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Arrival:
        """Copy to each device tensor its host tensor, once all that the current stream was given so far is done.

        That order keeps the copies off memory that is still in use there: a buffer whose block computes, or what the
        allocator took back from a tensor that died.
        """
        pairs = list(pairs)
        call = current_call()
        if call is not None:
            call[MOVES].append((time.perf_counter(), sum(target.nbytes for target, _ in pairs)))
        with torch.inference_mode(False):
            if self._stream is None:
                start = time.perf_counter()
                for target, source in pairs:
                    target.copy_(source)
                return Arrival(self.device, None, time.perf_counter() - start)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            with torch.cuda.stream(self._stream):
                events[0].record(self._stream)
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
                events[1].record(self._stream)
            return Arrival(self.device, events, 0.0)
