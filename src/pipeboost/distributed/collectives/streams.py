"""`Stream`: a CUDA stream, or a CPU's only order of work."""

from __future__ import annotations

import contextlib

import torch


class Stream:
    """A CUDA stream.

    Args:
        stream: None for whatever this thread's work goes to, which is all that there is on a CPU.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    @classmethod
    def current(cls, device: torch.device) -> Stream:
        """Return the one that this thread's work goes to."""
        return cls(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    @classmethod
    def new(cls, device: torch.device, *, first: bool = False) -> Stream:
        """Return another one.

        Args:
            first: its kernels get the multiprocessors that become free before those of other streams.
        """
        return cls(torch.cuda.Stream(device, priority=-1 if first else 0) if device.type == "cuda" else None)

    def on(self) -> contextlib.AbstractContextManager[object]:
        """Inside, this thread's work goes to it."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """Return what stands for all the work that it was given so far."""
        return None if self._stream is None else self._stream.record_event()

    def after(self, mark: torch.cuda.Event | None) -> None:
        """Let what comes next wait for what was marked."""
        if self._stream is not None and mark is not None:
            self._stream.wait_event(mark)
