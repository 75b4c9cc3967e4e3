"""`pipeboost warm`: compiles a model's code for some sizes, for the processes that come after."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeboost.acceleration import accelerate_pipeline
from pipeboost.cli.flags import Acceleration, Device
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.config import CompileConfig
from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.features.compile.artifacts import artifacts_folder
from pipeboost.generate import load_model

STEPS = 2
"""Denoising steps of a call that compiles: a first one, and one that finds all made."""


def run_warm(
    acceleration: Acceleration,
    model: Annotated[str | None, typer.Argument(help="folder of a Diffusers pipeline, or a hub id; else ours")] = None,
    sizes: Annotated[str, typer.Option(help="WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, several by commas")] = "1024x1024",
    prompt: Annotated[str, typer.Option(help="of the short calls that compile")] = "a red fox in the snow",
    device: Device = "auto",
) -> None:
    """Compile a model's code for some sizes beforehand, so that the next process starts at once."""
    calls = {size: parse_size(size) for size in sizes.split(",")}
    console = Console()
    with quiet_libraries(), load_model(model, device=device, **acceleration.settings) as loaded:
        pipe = loaded.pipe
        plan = pipe.acceleration.plan
        taken = signature_of(stock_class(pipe), "__call__").parameters
        for size, call in calls.items():
            if not call.keys() <= taken.keys():
                missing = " and ".join(sorted(call.keys() - taken.keys()))
                raise ConfigurationError(f"--sizes {quoted(size)}: {stock_class(pipe).__name__} takes no {missing}")
        if not plan["compile"].on:
            raise ConfigurationError(f"there is nothing to compile beforehand: {plan['compile'].why}")
        if _leaves_vae_to_warm(pipe):
            config = pipe.acceleration.config
            compile = CompileConfig(vae=True) if config.compile == "auto" else replace(config.compile, vae=True)
            accelerate_pipeline(pipe, config=replace(config, compile=compile))
        defaults = {name: value for name, value in loaded.settings.request_defaults.items() if name != "prompt"}
        defaults |= defaults.pop("call", {})
        for size, call in calls.items():
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
