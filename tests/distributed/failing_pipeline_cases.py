"""What the ranks run in `test_failing_pipelines`: calls of a tiny pipeline in which one rank fails."""

import time
from typing import Any

import torch

from pipeboost import ParallelConfig, accelerate_pipeline
from tests.distributed.failure_cases import Trouble, outcome
from tests.pipelines.tiny import TINY

STAGES = ("text encoding", "denoising", "decoding")
TIMEOUT = 3.0
"""Seconds that ranks wait for each other, on machines that do much else."""


def failing_calls(
    name: str, kind: str, rank: int, stage: str, device: str = "cpu", axis: str = "cfg"
) -> dict[str, Any]:
    """A call in which one rank fails at a stage, and the next one; what each raised, or returned."""
    pipe = _accelerate(TINY[name].build().to(device), TIMEOUT, axis)
    pipe.acceleration.progress = _trouble(kind, rank, stage)
    before = time.monotonic()
    first = outcome(lambda: _latents(name, pipe).mean().item())
    first["seconds"] = time.monotonic() - before
    pipe.acceleration.progress = None
    return {"first": first, "second": outcome(lambda: _latents(name, pipe).mean().item())}


def raising_calls(name: str) -> dict[str, Any]:
    """Each rank in turn raises at each stage, and after each time the pipeline is accelerated anew.

    Returns:
        `"raised"`: by rank and stage, what the call raised here; `"differences"`: of the next result to that of one
        rank, and of stock to stock in the end.
    """
    entry = TINY[name]
    stock = entry.build()
    with torch.no_grad():
        expected = _latents(name, stock)
    raised, differences = {}, []
    pipe = _accelerate(entry.build(), 30.0)
    for rank in (0, 1):
        for stage in STAGES:
            pipe.acceleration.progress = _trouble("raise", rank, stage)
            raised[rank, stage] = outcome(lambda: _latents(name, pipe).mean().item())
            pipe.acceleration.remove()
            _accelerate(pipe, 30.0)
            differences.append(_difference(_latents(name, pipe), expected))
    pipe.acceleration.remove()
    differences.append(_difference(_latents(name, pipe), expected))
    return {"raised": raised, "differences": differences}


def bad_prompts(name: str) -> dict[str, Any]:
    """Prompts that the script refuses, between two that it takes, on the same groups."""
    pipe = _accelerate(TINY[name].build(), 30.0)
    before = _latents(name, pipe)
    refused = [outcome(lambda: _latents(name, pipe, prompt=3)), outcome(lambda: _latents(name, pipe, height=13.5))]
    after = _latents(name, pipe)
    return {"refused": refused, "difference": _difference(after, before)}


def _accelerate(pipe: Any, timeout: float, axis: str = "cfg") -> Any:
    layout = ParallelConfig(**{axis: 2}, timeout=timeout)
    quality = "exact" if axis == "cfg" else "lossless"
    return accelerate_pipeline(pipe, quality=quality, parallel=layout, compile=None, reuse=None)


def _latents(name: str, pipe: Any, **settings: Any) -> torch.Tensor:
    return TINY[name].call(pipe, **settings)


def _difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return (result - expected).abs().max().item()


def _trouble(kind: str, rank: int, stage: str) -> Any:
    trouble = Trouble(kind, rank, stage)

    def told(progress: Any) -> None:
        if progress.stage == stage and progress.step in (None, 1):
            trouble.at(stage)

    return told
