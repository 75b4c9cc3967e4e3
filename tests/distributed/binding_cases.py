"""What the ranks run in `test_binding`: one of them cannot do to the pipeline what the others do."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from pipeboost import ParallelConfig, accelerate_pipeline
from pipeboost import apply as parts
from pipeboost.core.errors import PipeboostError
from pipeboost.core.seams import stock_class
from pipeboost.distributed.collectives import groups as groups_module
from pipeboost.features.parallel import tensor
from tests.distributed.failure_cases import outcome
from tests.pipelines.tiny import TINY


def fails_while_accelerating(name: str, rank: int, path: str, /, **layout: Any) -> dict[str, Any]:
    """One rank fails at the component at `path`; what is left then, and what the next acceleration makes."""
    entry = TINY[name]
    pipe = entry.build()
    before, classes = _surroundings(), _classes(pipe)
    stock = _latents(entry, pipe)
    with _failing(rank, path):
        first = outcome(lambda: str(_accelerated(pipe, layout)))
    left = {"surroundings": _surroundings() == before, "classes": _classes(pipe) == classes}
    again = _difference(_latents(entry, pipe), stock)
    _accelerated(pipe, layout)
    ours = _difference(_latents(entry, pipe), stock)
    pipe.acceleration.remove()
    return {"first": first, "left": left, "stock": again, "next": ours, "end": _surroundings() == before}


def fails_while_accelerating_anew(name: str, rank: int, first: Mapping[str, Any], second: Mapping[str, Any]) -> Any:
    """One rank cannot have the second layout; what it raises, and the latents of the first one, which is back."""
    entry = TINY[name]
    pipe = entry.build()
    stock = _latents(entry, pipe)
    _accelerated(pipe, first)
    with _failing(rank, "scheduler", only_first=True):
        raised = outcome(lambda: str(_accelerated(pipe, second)))
    degrees = pipe.acceleration.plan["parallel"].choice
    difference = _difference(_latents(entry, pipe), stock)
    pipe.acceleration.remove()
    return raised, degrees, difference


def refuses_to_plan(name: str, rank: int, before: Mapping[str, Any], parallel: Any) -> dict[str, Any]:
    """One rank is asked for a kernel that it does not have, and its script goes on; what all raise, and can do next."""
    entry = TINY[name]
    pipe = entry.build()
    stock = _latents(entry, pipe)
    if before:
        _accelerated(pipe, before)
    known, attention = _latents(entry, pipe), "flash4" if dist.get_rank() == rank else "sdpa"

    def accelerate(attention: str) -> str:
        accelerate_pipeline(pipe, attention=attention, parallel=parallel, compile=None, reuse=None)
        return str(pipe.acceleration.plan["parallel"].choice)

    first = outcome(lambda: accelerate(attention))
    left = _difference(_latents(entry, pipe), known)
    layout = accelerate("sdpa")
    ours = _difference(_latents(entry, pipe), stock)
    pipe.acceleration.remove()
    return {"first": first, "left": left, "layout": layout, "next": ours}


def fails_at_the_next_call(name: str, rank: int, path: str, /, **layout: Any) -> dict[str, Any]:
    """After a call all ranks replace the denoiser, which one rank then cannot bind; the calls after that can."""
    entry = TINY[name]
    pipe = entry.build()
    stock = _latents(entry, pipe)
    _accelerated(pipe, layout)
    mesh = pipe.acceleration._applied.team.mesh
    _latents(entry, pipe)
    other = entry.build()
    pipe.transformer, pipe.scheduler = other.transformer, other.scheduler
    with _failing(rank, path):
        refused = outcome(lambda: _latents(entry, pipe).mean().item())
    classes = _classes(other)
    difference = _difference(_latents(entry, pipe), stock)
    same = pipe.acceleration._applied.team.mesh is mesh
    pipe.acceleration.remove()
    left = _difference(_latents(entry, pipe), stock)
    return {
        "refused": refused,
        "stock again": classes["transformer"] == _classes(entry.build())["transformer"],
        "next": difference,
        "same mesh": same,
        "left": left,
    }


def dies_while_accelerating(name: str, rank: int, /, **layout: Any) -> dict[str, Any]:
    """One rank is killed while it accelerates."""
    with _failing(rank, "transformer", kill=True):
        return outcome(lambda: str(_accelerated(TINY[name].build(), layout)))


def interrupted_while_splitting(name: str, rank: int, moments: list[int]) -> dict[str, Any]:
    """Ctrl-C at several moments of splitting weights, on one rank or on all (-1).

    Returns:
        `"raised"`: at each, here; `"whole"`: whether all weights were stock's after it; `"differences"`: to one rank of
        the call that is made in the end, and of stock after it.
    """
    entry = TINY[name]
    pipe = entry.build()
    stock, raised, whole = _latents(entry, pipe), [], []
    modules = (pipe.transformer, pipe.text_encoder)
    weights = [(each, each.data.clone(), each.shape) for module in modules for each in module.parameters()]
    for moment in moments:
        try:
            with _interrupted(moment if rank in (-1, dist.get_rank()) else -1):
                _accelerated(pipe, {"tensor": 2})
            raised.append("")
        except (KeyboardInterrupt, PipeboostError) as error:
            raised.append(type(error).__name__)
        whole.append(all(torch.equal(each, value) for each, value, _ in weights) and type(pipe) is stock_class(pipe))
    _accelerated(pipe, {"tensor": 2})
    differences = [_difference(_latents(entry, pipe), stock)]
    pipe.acceleration.remove()
    differences.append(_difference(_latents(entry, pipe), stock))
    return {"raised": raised, "whole": whole, "differences": differences}


def interrupted_while_joining(name: str, rank: int) -> dict[str, Any]:
    """Ctrl-C on one rank in the middle of joining weights: what `remove()` raised, and what is there after another."""
    entry = TINY[name]
    pipe = entry.build()
    stock, join, left = _latents(entry, pipe), tensor._whole_of, [3]

    def interrupting(*args: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0 and dist.get_rank() == rank:
            signal.raise_signal(signal.SIGINT)
        return join(*args)

    _accelerated(pipe, {"tensor": 2})
    acceleration, raised = pipe.acceleration, ""
    tensor._whole_of = interrupting
    try:
        acceleration.remove()
    except KeyboardInterrupt:
        raised = "KeyboardInterrupt"
        acceleration.remove()
    finally:
        tensor._whole_of = join
    return {"raised": raised, "joined": left[0] < 0, "difference": _difference(_latents(entry, pipe), stock)}


@contextmanager
def _interrupted(moment: int) -> Iterator[None]:
    """Inside, Ctrl-C comes before the `moment`th line that runs while weights are split; never, where that is -1."""
    functions = (tensor.Shares.split, tensor._share_of, tensor.guard_model, tensor.become_share)
    codes = {function.__code__ for function in functions}
    left = moment

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code not in codes:
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace if moment >= 0 else before)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _failing(rank: int, path: str, *, kill: bool = False, only_first: bool = False) -> Iterator[None]:
    """Inside, one rank fails at the last thing that is done to the component at `path`."""
    stock = parts.instrument_component
    failures = []

    def watch(component: str, *args: Any) -> None:
        if component == path and dist.get_rank() == rank and not (only_first and failures):
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            failures.append(component)
            raise ValueError(f"boom on rank {rank}")
        stock(component, *args)

    parts.instrument_component = watch
    try:
        yield
    finally:
        parts.instrument_component = stock


def _accelerated(pipe: Any, layout: Mapping[str, Any]) -> Any:
    return accelerate_pipeline(pipe, parallel=ParallelConfig(**{"timeout": 10.0, **layout}))


def _latents(entry: Any, pipe: Any) -> torch.Tensor:
    with torch.no_grad():
        return entry.call(pipe, output_type="latent")


def _difference(ours: torch.Tensor, stock: torch.Tensor) -> float:
    return float((ours - stock).abs().max())


def _surroundings() -> tuple[set[str], list[str]]:
    return set(groups_module._groups), [each.name for each in threading.enumerate() if "pipeboost" in each.name]


def _classes(pipe: Any) -> dict[str, type]:
    modules = {"": type(pipe), "transformer": type(pipe.transformer), "scheduler": type(pipe.scheduler)}
    return modules | {name: type(module) for name, module in pipe.transformer.named_modules() if name}
