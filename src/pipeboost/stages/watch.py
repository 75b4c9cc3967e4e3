"""Layers on a pipeline's doors that count steps, take times and obey cancellation. They change no value.

Times on CUDA are event pairs, read after the call, so that nothing in the loop waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeboost.call import Call, current_call
from pipeboost.ledger import Ledger
from pipeboost.seams import Layer

OUTERMOST = -100.0
WHOLE_CALL = "other"
"""The stage of a call's outermost span: what no door below it accounts for."""

DOORS: tuple[tuple[str, str, str], ...] = (
    ("", "check_inputs", "input validation"),
    ("", "encode_prompt", "text encoding"),
    ("", "encode_image", "image encoding"),
    ("", "prepare_latents", "latent preparation"),
    ("vae", "encode", "image VAE encoding"),
    ("scheduler", "set_timesteps", "timestep preparation"),
    ("vae", "decode", "decoding"),
)
"""Component (empty: the pipeline itself), method, and the stage that begins and ends there."""


@dataclass
class Span:
    """A stretch of a call.

    Attributes:
        stage: the stage's name.
        step: the denoising step it belongs to, None outside the loop.
        branch: the CFG branch of a forward, None elsewhere.
        start: host time, `time.perf_counter` seconds.
        end: the same; 0 while it runs.
        events: CUDA events at start and end, where there is a CUDA device.
        depth: how many spans it is nested in.
    """

    stage: str
    step: int | None
    branch: int | None
    start: float
    end: float = 0.0
    events: tuple[Any, Any] | None = None
    depth: int = 0

    def seconds(self) -> float:
        """Device time where there are events, which must have completed; else host time."""
        if self.events is not None:
            return self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.end - self.start


def watched_components(pipe: Any, denoisers: Mapping[str, Any]) -> dict[str, Any]:
    """The objects in whose doors `watch` stands, by path from the pipeline (the pipeline itself: the empty path)."""
    found = {path: pipe if not path else getattr(pipe, path, None) for path, _, _ in DOORS}
    return {path: obj for path, obj in {**found, **denoisers}.items() if obj is not None}


def watch(path: str, obj: Any, ledger: Ledger, *, denoiser: bool) -> None:
    """Stand in the doors of one object; pipelines that share it share the layers."""
    doors = [(method, _stage_layer(stage)) for component, method, stage in DOORS if component == path]
    if denoiser:
        doors.append(("__call__", _denoise))
    if path == "scheduler":
        doors.append(("step", _advance))

    def apply(inner: Ledger) -> None:
        for method, layer in doors:
            if callable(getattr(obj, method, None)):
                inner.add_layer(obj, method, layer, order=OUTERMOST)

    ledger.share(obj, "watch", path, apply)


_stage_layers: dict[str, Layer] = {}


def _stage_layer(stage: str) -> Layer:
    def watched(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return call_next(*args, **kwargs)
        return timed(call, stage, None, None, lambda: call_next(*args, **kwargs))

    return _stage_layers.setdefault(stage, watched)


def _denoise(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is None:
        return call_next(*args, **kwargs)
    call.raise_if_cancelled()
    call.follow_scheduler()
    call.branch += 1
    return timed(call, "denoising", call.step, call.branch, lambda: call_next(*args, **kwargs))


def _advance(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is None:
        return call_next(*args, **kwargs)
    result = timed(call, "scheduler step", call.step, None, lambda: call_next(*args, **kwargs))
    call.step += 1
    call.branch = -1
    call.raise_if_cancelled()
    return result


def timed(call: Call, stage: str, step: int | None, branch: int | None, run: Callable[[], Any]) -> Any:
    """Run `run()` as a span of `call` and return its result."""
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) if on_cuda else None
    depth = call.state.get("open spans", 0)
    call.state["open spans"] = depth + 1
    span = Span(stage, step, branch, time.perf_counter(), events=events, depth=depth)
    call.events.append(span)
    if events is not None:
        events[0].record()
    try:
        return run()
    finally:
        if events is not None:
            events[1].record()
        span.end = time.perf_counter()
        call.state["open spans"] = depth
