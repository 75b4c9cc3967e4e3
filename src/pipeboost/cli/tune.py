"""`pipeboost tune`: finds which denoising steps to compute within a budget, on the user's prompts."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.errors import ConfigurationError, MissingPackageError
from pipeboost.core.user_files import make_folder, user_path
from pipeboost.generate import load_model
from pipeboost.generate.requests import read_prompts


def run_tune(
    model: str | None,
    *,
    prompts: Path,
    budget: str,
    share: float,
    output: Path,
    device: str,
    **size: int | None,
) -> int:
    """Tune, print the result, and write it with a plot and all measurements into a folder.

    Args:
        size: `width`, `height` and `num_inference_steps` of all prompts; None leaves them to the pipeline.

    Returns:
        The exit code: 0 where the held-out prompts kept the budget, else 1.

    Raises:
        ConfigurationError: a file cannot be read or written, or there are too few prompts.
    """
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
