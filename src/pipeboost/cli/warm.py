"""`pipeboost warm`: compiles a model's code for some sizes, for the processes that come after."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from pipeboost.acceleration import accelerate_pipeline
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.config import CompileConfig
from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.features.compile.artifacts import artifacts_folder
from pipeboost.generate import load_model

STEPS = 2
"""Denoising steps of a call that compiles: a first one, and one that finds all made."""


def run_warm(model: str | None, *, sizes: Sequence[str], prompt: str, device: str, settings: Mapping[str, Any]) -> None:
    """Make one short call for each size, and print what it took.

    Args:
        model: folder of a Diffusers pipeline, or a hub id; None for the demo model.
        sizes: `WIDTHxHEIGHT`, or `WIDTHxHEIGHTxFRAMES`.
        prompt: of the calls.
        device: `auto`, `cpu` or `cuda`.
        settings: arguments of `accelerate_pipeline`.

    Raises:
        ConfigurationError: a size is none, or the plan compiles nothing.
    """
    calls = [parse_size(size) for size in sizes]
    console = Console()
    with quiet_libraries(), load_model(model, device=device, **settings) as loaded:
        pipe = loaded.pipe
        plan = pipe.acceleration.plan
        if not plan["compile"].on:
            raise ConfigurationError(f"there is nothing to compile beforehand: {plan['compile'].why}")
        if _leaves_vae_to_warm(pipe):
            config = pipe.acceleration.config
            compile = CompileConfig(vae=True) if config.compile == "auto" else replace(config.compile, vae=True)
            accelerate_pipeline(pipe, config=replace(config, compile=compile))
        defaults = {name: value for name, value in loaded.settings.request_defaults.items() if name != "prompt"}
        defaults |= defaults.pop("call", {})
        for size, call in zip(sizes, calls, strict=True):
            start = time.perf_counter()
            pipe.acceleration.warm_up(**defaults | {"prompt": prompt, "num_inference_steps": STEPS} | call)
            console.print(f"{size}: {time.perf_counter() - start:.1f} s", highlight=False)
    console.print(f"Compiled code is kept in {artifacts_folder()}", soft_wrap=True, highlight=False)


def parse_size(size: str) -> dict[str, int]:
    """Return the arguments of a call for `"1024x1024"`, or `"832x480x81"` with frames.

    Raises:
        ConfigurationError: it is no size.
    """
    numbers = size.lower().replace("×", "x").split("x")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigurationError(f"--sizes {quoted(size)} must be WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, as 1024x1024")
    return dict(zip(("width", "height", "num_frames"), map(int, numbers), strict=False))


def _leaves_vae_to_warm(pipe: Any) -> bool:
    """Whether the plan leaves the VAE stock, or compiles some sizes of it, only because of what compiling costs."""
    plan, config = pipe.acceleration.plan, pipe.acceleration.config
    wanted = "auto" if config.compile == "auto" else config.compile.vae
    settings = plan["vae"].settings
    costly = settings is None and "`pipeboost warm`" in plan["vae"].why
    return wanted == "auto" and (costly or getattr(settings, "sizes", None) is not None)
