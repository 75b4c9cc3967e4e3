"""The commands and their flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeboost.cli.flags import Acceleration, Device, with_acceleration
from pipeboost.cli.generate_flags import GenerateCommand, generate

app = typer.Typer(
    help="pipeboost: one line gives a stock Diffusers pipeline the speed of a dedicated engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=GenerateCommand)(with_acceleration(generate))


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="denoising steps per image")] = 28,
    output: Annotated[Path, typer.Option(help="folder for the picture and the images")] = Path("demo_output"),
    device: Device = "auto",
) -> None:
    """Stock and accelerated images of the model we ship, side by side, with times."""
    from pipeboost.cli.demo import run_demo

    run_demo(steps=steps, output=output, device=device)


@app.command()
@with_acceleration
def plan(
    model: Annotated[str, typer.Argument(help="folder of a Diffusers pipeline, a hub id, or a size bench knows")],
    acceleration: Acceleration,
    device: Device = "auto",
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings")] = None,
) -> None:
    """What accelerate_pipeline would do to a model on this machine, without loading its weights."""
    from pipeboost.cli.plan import print_plan

    print_plan(model, device=device, config=config, ranks=acceleration.ranks, **acceleration.settings)


@app.command()
def doctor() -> None:
    """What is installed, what this device could use, and how to install what is missing."""
    from pipeboost.cli.doctor import print_diagnosis

    print_diagnosis()


@app.command()
def tune(
    model: Annotated[str | None, typer.Argument(help="folder of a Diffusers pipeline, or a hub id; else ours")] = None,
    prompts: Annotated[Path, typer.Option(help="prompts, a line each, or JSONL, JSON or YAML")] = ...,  # type: ignore[assignment]
    budget: Annotated[str, typer.Option(help="what each picture has to reach, against stock's")] = "psnr>=30",
    share: Annotated[float, typer.Option(help="of the prompts that has to")] = 0.95,
    steps: Annotated[int | None, typer.Option(help="denoising steps of stock; else the pipeline's default")] = None,
    width: Annotated[int | None, typer.Option(help="in pixels; else the pipeline's default")] = None,
    height: Annotated[int | None, typer.Option(help="in pixels; else the pipeline's default")] = None,
    output: Annotated[Path, typer.Option(help="folder for the schedule, the plot and what was measured")] = Path(
        "tuned"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Find which denoising steps to compute within a budget of quality, on your prompts; continues where it stopped."""
    from pipeboost.cli.tune import run_tune

    raise typer.Exit(
        run_tune(
            model,
            prompts=prompts,
            budget=budget,
            share=share,
            output=output,
            device=device,
            width=width,
            height=height,
            num_inference_steps=steps,
        )
    )


@app.command()
@with_acceleration
def warm(
    acceleration: Acceleration,
    model: Annotated[str | None, typer.Argument(help="folder of a Diffusers pipeline, or a hub id; else ours")] = None,
    sizes: Annotated[str, typer.Option(help="WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, several by commas")] = "1024x1024",
    prompt: Annotated[str, typer.Option(help="of the short calls that compile")] = "a red fox in the snow",
    device: Device = "auto",
) -> None:
    """Compile a model's code for some sizes beforehand, so that the next process starts at once."""
    from pipeboost.cli.warm import run_warm

    run_warm(model, sizes=sizes.split(","), prompt=prompt, device=device, settings=acceleration.settings)


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="published sizes, such as flux.1-dev; `pipeboost bench list`")],
    tier: Annotated[list[str] | None, typer.Option(help="quality tier to measure; may be given several times")] = None,
    steps: Annotated[int, typer.Option(help="also time a denoising loop of this many steps; 0: not")] = 0,
    repeats: Annotated[int, typer.Option(help="timed forwards per variant")] = 7,
    output: Annotated[Path, typer.Option(help="folder for the JSON and Markdown results")] = Path("benchmarks/results"),
    device: Device = "auto",
) -> None:
    """Full-size random weights: stock, tuned stock and ours in one run, with errors and shares of the bound."""
    from pipeboost.cli.bench import run_bench

    code = run_bench(models, tiers=tier or ["lossless"], steps=steps, repeats=repeats, output=output, device=device)
    raise typer.Exit(code)
