"""`pipeboost demo`: the model we ship, stock and in each tier this machine supports, side by side."""

from __future__ import annotations

import re
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Column, Table

from pipeboost import accelerate_pipeline
from pipeboost.cli.flags import Device
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.config import TIERS, CompileConfig
from pipeboost.core.errors import ConfigurationError, MissingPackageError
from pipeboost.core.hardware import Hardware, detect_hardware, device_type
from pipeboost.core.user_files import make_folder, user_path
from pipeboost.demo_model.prompts import DEMO_CALL, DEMO_PROMPTS
from pipeboost.generate.loading import demo_weights
from pipeboost.quality import psnr

_SCALE, _MARGIN, _LEFT, _TOP = 2, 8, 150, 72


@dataclass
class Run:
    """One row of the table: a variant, its images, the median seconds of one, and those of a first, discarded one.

    Attributes:
        computed: denoising steps of the latest image that were not skipped.
        steps: of it in all.
    """

    name: str
    images: list[Image.Image]
    seconds: float
    warm_up: float
    computed: int
    steps: int


def run_demo(
    steps: Annotated[int, typer.Option(help="denoising steps per image")] = 28,
    output: Annotated[Path, typer.Option(help="folder for the picture and the images")] = Path("demo_output"),
    device: Device = "auto",
) -> None:
    """Stock and accelerated images of the model we ship, side by side, with times."""
    if steps < 1:
        raise ConfigurationError(f"--steps {steps} must be at least 1")
    hardware = detect_hardware(device_type(device))
    output = user_path(output, "--output")
    make_folder(output, f"--output {output}")
    console = Console()
    pipe, score = _load(hardware)
    size = f"{DEMO_CALL['width']}x{DEMO_CALL['height']}"
    console.print(f"[bold]pipeboost demo[/] on {hardware}: {len(DEMO_PROMPTS)} prompts, {steps} steps, {size}")
    runs: list[Run] = []
    with Progress(
        "{task.description:<24}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:

        def draw(name: str, settings: dict[str, Any] | None, steps: int) -> Run:
            task = progress.add_task(name, total=(len(DEMO_PROMPTS) + 1) * steps)
            return _draw(pipe, name, settings, steps, partial(progress.advance, task))

        for name, settings in _variants(hardware).items():
            runs.append(draw(name, settings, steps))
            if runs[-1].computed < steps and name == "fast":
                # What skipping steps has to beat: making no more steps than it computes.
                runs.append(draw(f"stock, {runs[-1].computed} steps", None, runs[-1].computed))
    _print_table(console, runs, score)
    if hardware.device == "cpu":
        console.print(
            "[dim]On a CPU 'exact' and 'lossless' run stock's own kernels, so they are as fast as stock; only skipping "
            "steps ('fast') and compiling save time.\nNeeds a GPU: faster attention kernels, 8-bit attention "
            "('balanced'), the speeds in the README's table.[/]"
        )
    for run in runs:
        name = re.sub(r"\W+", "_", run.name)
        for index, image in enumerate(run.images):
            image.save(output / f"{name}_{index}.png")
    rows = [(run.name, f"{run.seconds:.2f} s ({runs[0].seconds / run.seconds:.2f}x)", run.images) for run in runs]
    picture_grid(rows, [prompt.text for prompt in DEMO_PROMPTS]).save(output / "demo.png")
    console.print(f"Pictures: {output / 'demo.png'}")


def _load(hardware: Hardware) -> tuple[Any, Callable[..., float]]:
    weights = demo_weights()
    with quiet_libraries():
        try:
            from pipeboost.demo_model.score import score_images
        except ImportError as error:
            if (error.name or "").split(".")[0] not in ("skimage", "scipy"):
                raise
            raise MissingPackageError(f"the demo needs {error.name}: pip install scikit-image scipy") from error
        from diffusers import FluxPipeline

        pipe = FluxPipeline.from_pretrained(str(weights), local_files_only=True).to(hardware.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, score_images


def _variants(hardware: Hardware) -> dict[str, dict[str, Any] | None]:
    """Name → arguments of `accelerate_pipeline`; None is stock."""
    tiers = [tier for tier in TIERS if tier != "balanced" or hardware.device == "cuda"]
    variants: dict[str, dict[str, Any] | None] = {"stock": None, **{tier: {"quality": tier} for tier in tiers}}
    if hardware.device == "cpu" and hardware.compiler:
        variants["fast + compile"] = {"quality": "fast", "compile": CompileConfig()}
    return variants


def _draw(pipe: Any, name: str, settings: dict[str, Any] | None, steps: int, advance: Callable[[], None]) -> Run:
    def on_step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        advance()
        return kwargs

    if settings is not None:
        accelerate_pipeline(pipe, **settings)
    call = {**DEMO_CALL, "num_inference_steps": steps, "callback_on_step_end": on_step_end}
    images, seconds = [], []
    for seed, prompt in enumerate((DEMO_PROMPTS[0], *DEMO_PROMPTS), -1):
        started = time.perf_counter()
        images += pipe(prompt.text, **call, generator=torch.Generator().manual_seed(max(seed, 0))).images
        seconds.append(time.perf_counter() - started)
    computed = steps
    if settings is not None:
        computed = pipe.acceleration.report().computed_steps or steps
        pipe.acceleration.remove()
    return Run(name, images[1:], statistics.median(seconds[1:]), seconds[0], computed, steps)


def _print_table(console: Console, runs: Sequence[Run], score: Callable[..., float]) -> None:
    headings = ("s/image", "speed-up", "first", "to stock", "right", "computed")
    table = Table("", *(Column(each, justify="right", no_wrap=True) for each in headings))
    for run in runs:
        ratio = psnr(*(np.stack([*map(np.asarray, each.images)]) for each in (run, runs[0])), peak=255)
        table.add_row(
            run.name,
            f"{run.seconds:.2f}",
            f"{runs[0].seconds / run.seconds:.2f}x",
            f"{run.warm_up:.1f} s",
            "identical" if ratio == float("inf") else f"{ratio:.1f} dB",
            f"{score(run.images, [prompt.scene for prompt in DEMO_PROMPTS]):.0%}",
            f"{run.computed}/{run.steps}",
        )
    console.print(table)
    console.print(
        "[dim]first: the first call, which compiles; to stock: PSNR; right: pictures that show just what the prompt "
        "says; computed: steps of the latest picture[/]"
    )


def picture_grid(rows: Sequence[tuple[str, str, Sequence[Image.Image]]], prompts: Sequence[str]) -> Image.Image:
    """Put square images of one size side by side, enlarged.

    Args:
        rows: name, time and images of each variant, one image a prompt.
        prompts: the heading of each column.
    """
    side = rows[0][2][0].width * _SCALE
    size = (_LEFT + len(prompts) * (side + _MARGIN), _TOP + len(rows) * (side + _MARGIN))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for column, prompt in enumerate(prompts):
        x = _LEFT + column * (side + _MARGIN)
        pen.text((x, 6), "\n".join(textwrap.wrap(prompt, 40)[:4]), fill="black", font_size=13)
    for row, (name, speed, images) in enumerate(rows):
        y = _TOP + row * (side + _MARGIN)
        pen.text((8, y + side // 2 - 24), name, fill="black", font_size=18)
        pen.text((8, y + side // 2), speed, fill="black", font_size=14)
        for column, image in enumerate(images):
            enlarged = image.resize((side, side), Image.Resampling.LANCZOS)
            grid.paste(enlarged, (_LEFT + column * (side + _MARGIN), y))
    return grid
