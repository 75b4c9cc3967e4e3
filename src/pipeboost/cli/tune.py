"""`pipeboost tune`: finds which denoising steps to compute within a budget, on the user's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from pipeboost.cli.flags import Device
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.errors import ConfigurationError, MissingPackageError
from pipeboost.core.user_files import make_folder, user_path
from pipeboost.generate import load_model
from pipeboost.generate.requests import read_prompts


def run_tune(
    prompts: Annotated[Path, typer.Option(help="prompts, a line each, or JSONL, JSON or YAML")],
    model: Annotated[str | None, typer.Argument(help="folder of a Diffusers pipeline, or a hub id; else ours")] = None,
    budget: Annotated[str, typer.Option(help="what each picture has to reach, against stock's")] = "psnr>=30",
    share: Annotated[float, typer.Option(help="of the prompts that has to")] = 0.95,
    steps: Annotated[int | None, typer.Option(help="denoising steps of stock; else the pipeline's default")] = None,
    width: Annotated[int | None, typer.Option(help="in pixels; else the pipeline's default")] = None,
    height: Annotated[int | None, typer.Option(help="in pixels; else the pipeline's default")] = None,
    output: Annotated[Path, typer.Option(help="folder for the schedule and what was measured")] = Path("tuned"),
    device: Device = "auto",
) -> int:
    """Find which denoising steps to compute within a budget of quality, on your prompts; continues where it stopped."""
    rows = read_prompts(user_path(prompts, "--prompts"))
    output = user_path(output, "--output")
    make_folder(output, f"--output {output}")
    for row in rows:
        if set(row) - {"prompt", "negative_prompt", "width", "height"}:
            raise ConfigurationError(f"--prompts {prompts}: tune reads prompt, negative_prompt, width and height")
    console, errors = Console(), Console(stderr=True)
    columns = SpinnerColumn(), "{task.description}", TimeElapsedColumn()
    with (
        quiet_libraries(),
        load_model(model, device=device, quality="fast", cache=None) as loaded,
        Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar,
    ):
        task = bar.add_task("recording stock")
        call = {name: value for name, value in loaded.settings.request_defaults.items() if name != "prompt"}
        call |= call.pop("call", {})
        size = {"width": width, "height": height, "num_inference_steps": steps}
        given = {name: value for name, value in size.items() if value is not None}
        tuned = loaded.pipe.acceleration.tune(
            rows,
            budget=budget,
            share=share,
            folder=output,
            progress=lambda made: bar.update(task, description=f"{made} calls"),
            **call | given,
        )
    console.print(str(tuned), soft_wrap=True, highlight=False)
    tuned.save(output / "schedule.yaml")
    command = {**given, "num_inference_steps": tuned.steps, "acceleration": tuned.settings}
    (output / "generate.yaml").write_text(yaml.safe_dump(command, sort_keys=False))
    try:
        tuned.plot(output / "shares.png")
        plotted = "and shares.png"
    except MissingPackageError as error:
        plotted = f"but no shares.png: {error}"
    console.print(f"\nIn {output}: schedule.yaml for accelerate_pipeline(config=…),")
    console.print(f"generate.yaml for pipeboost generate --config …, {plotted}")
    return 0 if tuned.kept else 1
