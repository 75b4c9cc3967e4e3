"""The flags that commands share, each defined once, and those of `pipeboost generate`, for which a file may stand."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from pipeboost.core.config import ParallelConfig
from pipeboost.core.config_sources import file_settings
from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.distributed import world_size

_speed = partial(typer.Option, rich_help_panel="Speed")
_gpus = partial(typer.Option, rich_help_panel="Several GPUs")

_Text = str | None
_Texts = list[str] | None
_File = Path | None
Device = Annotated[str, _speed(help="auto, cpu or cuda")]
_model = partial(typer.Option, rich_help_panel="Model")
_request = partial(typer.Option, rich_help_panel="What to make")
_output = partial(typer.Option, rich_help_panel="Output")
_ACCELERATION = "acceleration"


class Acceleration(NamedTuple):
    """What the flags of speed and layout ask for: arguments of `accelerate_pipeline`, and how many ranks."""

    settings: dict[str, Any]
    ranks: int


def _acceleration(
    quality: Annotated[_Text, _speed("--quality", "--tier", help="exact, lossless, balanced or fast")] = None,
    attention_backend: Annotated[_Text, _speed(help="attention kernel; `pipeboost doctor` lists them")] = None,
    compile: Annotated[bool | None, _speed("--compile/--no-compile", help="torch.compile; else as the tier")] = None,
    offload: Annotated[_Text, _speed(help="where components wait: resident, stage, layerwise")] = None,
    num_gpus: Annotated[int | None, _gpus(help="GPUs to share the work among")] = None,
    enable_cfg_parallel: Annotated[bool, _gpus("--enable-cfg-parallel", help="one guidance branch a GPU")] = False,
    ulysses_degree: Annotated[int | None, _gpus(help="GPUs that share the heads")] = None,
    ring_degree: Annotated[int | None, _gpus(help="GPUs that share the tokens")] = None,
    tp_size: Annotated[int | None, _gpus(help="GPUs that share the weights")] = None,
) -> Acceleration:
    if num_gpus is not None and num_gpus < 1:
        raise ConfigurationError(f"--num-gpus {num_gpus} must be at least 1")
    cfg = 2 if enable_cfg_parallel else None
    split = {"cfg": cfg, "ulysses": ulysses_degree, "ring": ring_degree, "tensor": tp_size}
    degrees: dict[str, Any] = {name: degree for name, degree in split.items() if degree is not None}
    ranks = world_size() if num_gpus is None else num_gpus
    layout = ParallelConfig(**degrees) if degrees or num_gpus == 1 else None
    if layout is not None:
        ranks = layout.size
        if num_gpus not in (None, ranks):
            raise ConfigurationError(f"--num-gpus {num_gpus} is not the product of the parallel flags, {ranks}")
    kind = None if compile is None else "regional" if compile else "off"
    settings = {"quality": quality, "attention": attention_backend, "compile": kind, "offload": offload}
    given = {name: value for name, value in {**settings, "parallel": layout}.items() if value is not None}
    return Acceleration(given, ranks)


def with_acceleration(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command the flags of speed and layout; what they ask for is its argument `acceleration`."""
    shared = inspect.signature(_acceleration, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [each for name, each in own.items() if name != "acceleration"] + list(shared.values())

    def run(**given: Any) -> int | None:
        return command(acceleration=_acceleration(**{name: given.pop(name) for name in shared}), **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    keyword = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature([each.replace(kind=keyword) for each in parameters])  # type: ignore[attr-defined]
    return run


class GenerateCommand(TyperCommand):
    """One whose `--save-output` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = []
        for index, word in enumerate(args):
            bare = word == "--save-output" and (index + 1 == len(args) or args[index + 1].startswith("--"))
            words.append("--save-output=" if bare else word)
        return super().parse_args(ctx, words)


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
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


ModelPath = Annotated[_Text, _model(help="folder of a Diffusers pipeline or a hub id; else the demo model")]
VaePath = Annotated[_Text, _model(help="folder or hub id of another VAE for it")]
LoraPath = Annotated[_Texts, _model(help="a LoRA, PATH or PATH=SCALE; may be given several times")]
Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=read_config,
        help="YAML or JSON file: these flags with underscores, and `acceleration:`; flags given here win",
    ),
]
NegativePrompt = Annotated[_Text, _request(help="what not to show")]
ImagePath = Annotated[_Texts, _request(help="path or URL of a picture to edit or animate; or several")]
Width = Annotated[int | None, _request(help="pixels")]
Height = Annotated[int | None, _request(help="pixels")]
NumFrames = Annotated[int | None, _request(help="frames of a video")]
Steps = Annotated[int | None, _request(help="denoising steps")]
GuidanceScale = Annotated[float | None, _request(help="how closely to follow the prompt")]
CallArguments = Annotated[_Texts, _request(help="NAME=VALUE, a further argument of the pipeline's own call")]


def generate(
    ctx: typer.Context,
    acceleration: Acceleration,
    model_path: ModelPath = None,
    vae_path: VaePath = None,
    lora_path: LoraPath = None,
    config: Config = None,
    prompt: Annotated[_Texts, _request(help="what to show; may be given several times")] = None,
    prompt_file: Annotated[_File, _request(help="a prompt a line; JSONL, JSON or YAML with values of each")] = None,
    negative_prompt: NegativePrompt = None,
    image_path: ImagePath = None,
    width: Width = None,
    height: Height = None,
    num_frames: NumFrames = None,
    fps: Annotated[int | None, _request(help="frames a second of a video (16)")] = None,
    num_inference_steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int | None, _request(help="of the first request; the next ones count up")] = None,
    call: CallArguments = None,
    save_output: Annotated[_Text, _output(metavar="[PATH]", help="save, to this file or folder; the default")] = None,
    no_save_output: Annotated[bool, _output("--no-save-output", help="save nothing, only report")] = False,
    output_path: Annotated[_File, _output(help="folder that outputs go to (outputs)")] = None,
    report: Annotated[_File, _output(help="JSON: each output's seed, path, times and memory")] = None,
    profile: Annotated[_File, _output(help="Chrome trace of stages and steps, with exact memory")] = None,
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
