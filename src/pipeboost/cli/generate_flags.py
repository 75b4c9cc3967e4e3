"""The flags of `pipeboost generate`, grouped, and a file that may stand for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pipeboost.cli.flags import Acceleration, Device
from pipeboost.core.config_sources import file_settings
from pipeboost.core.errors import ConfigurationError, quoted

_model = partial(typer.Option, rich_help_panel="Model")
_request = partial(typer.Option, rich_help_panel="What to make")
_output = partial(typer.Option, rich_help_panel="Output")

_ACCELERATION = "acceleration"


class GenerateCommand(TyperCommand):
    """One whose `--save-output` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = []
        for index, word in enumerate(args):
            bare = word == "--save-output" and (index + 1 == len(args) or args[index + 1].startswith("--"))
            words.append("--save-output=" if bare else word)
        return super().parse_args(ctx, words)


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make a file's settings the flags' defaults, so that the command line wins and values are checked alike."""
    if path is None:
        return None
    flags: dict[Any, Any] = {parameter.name: parameter for parameter in ctx.command.params}
    known = [name for name in flags if name not in ("config", "help")]
    settings = file_settings(path, [*known, _ACCELERATION])
    ctx.obj = settings.pop(_ACCELERATION, None) or {}
    if not isinstance(ctx.obj, Mapping):
        raise ConfigurationError(f"config file {path}: acceleration={quoted(ctx.obj)} must be a mapping of settings")
    if isinstance(settings.get("call"), Mapping):
        settings["call"] = [f"{name}={json.dumps(value, default=str)}" for name, value in settings["call"].items()]
    for name, value in settings.items():
        flag = flags[name]
        if name == "save_output" and value is True:
            settings[name] = ""  # as the flag does without a value
        elif flag.multiple and not isinstance(value, list):
            settings[name] = [value]
        refused = () if flag.is_flag or name == "save_output" else (bool,)
        if any(isinstance(each, (dict, list, *refused)) for each in (settings[name] if flag.multiple else [value])):
            raise ConfigurationError(f"config file {path}: {name}={quoted(value)} is not a value of its flag")
    ctx.default_map = settings
    return path


def generate(
    ctx: typer.Context,
    acceleration: Acceleration,
    model_path: Annotated[
        str | None, _model(help="folder of a Diffusers pipeline or a hub id; else the demo model")
    ] = None,
    vae_path: Annotated[str | None, _model(help="folder or hub id of another VAE for it")] = None,
    lora_path: Annotated[
        list[str] | None, _model(help="a LoRA, PATH or PATH=SCALE; may be given several times")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_read_config,
            help="YAML or JSON file: these flags with underscores, and `acceleration:`; flags given here win",
        ),
    ] = None,
    prompt: Annotated[list[str] | None, _request(help="what to show; may be given several times")] = None,
    prompt_file: Annotated[
        Path | None, _request(help="a prompt a line; JSONL, JSON or YAML with values of each")
    ] = None,
    negative_prompt: Annotated[str | None, _request(help="what not to show")] = None,
    image_path: Annotated[
        list[str] | None, _request(help="path or URL of a picture to edit or animate; several where taken")
    ] = None,
    width: Annotated[int | None, _request(help="pixels")] = None,
    height: Annotated[int | None, _request(help="pixels")] = None,
    num_frames: Annotated[int | None, _request(help="frames of a video")] = None,
    fps: Annotated[int | None, _request(help="frames a second of a video (16)")] = None,
    num_inference_steps: Annotated[int | None, _request(help="denoising steps")] = None,
    guidance_scale: Annotated[float | None, _request(help="how closely to follow the prompt")] = None,
    seed: Annotated[int | None, _request(help="of the first request; the next ones count up")] = None,
    call: Annotated[
        list[str] | None, _request(help="NAME=VALUE, a further argument of the pipeline's own call")
    ] = None,
    save_output: Annotated[
        str | None, _output(metavar="[PATH]", help="save, to this file or folder; the default")
    ] = None,
    no_save_output: Annotated[bool, _output("--no-save-output", help="save nothing, only report")] = False,
    output_path: Annotated[Path | None, _output(help="folder that outputs go to (outputs)")] = None,
    report: Annotated[Path | None, _output(help="JSON: each output's seed, path, times and memory")] = None,
    profile: Annotated[Path | None, _output(help="Chrome trace of stages and steps, with exact memory")] = None,
    warmup: Annotated[bool, _output("--warmup", help="first make an output that is not reported")] = False,
    device: Device = "auto",
) -> None:
    """Make images or videos from prompts; without any flag, an image of the model we ship."""
    from pipeboost.cli.generate import generate_on_ranks, requests_from
    from pipeboost.cli.generate_output import Output
    from pipeboost.generate.loading import ModelSettings
    from pipeboost.generate.outputs import check_fps
    from pipeboost.generate.requests import FIELDS

    if fps is not None:
        check_fps(fps)
    output = Output.of(save=save_output, no_save=no_save_output, folder=output_path, report=report, profile=profile)
    settings = ModelSettings.of(
        model_path,
        vae_path=vae_path,
        lora_path=lora_path or (),
        device=device,
        acceleration={**(ctx.obj or {}), **acceleration.settings},
        ranks=acceleration.ranks,
    )
    given = {name: ctx.params[name] for name in FIELDS if name not in ("prompt", "call")}
    requests = requests_from(prompt or (), prompt_file, given | {"call": call or ()}, settings.request_defaults)
    generate_on_ranks(settings, acceleration.ranks, requests, fps=fps, warm_up=warmup, output=output)
