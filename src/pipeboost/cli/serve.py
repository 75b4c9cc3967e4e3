"""`pipeboost serve`: checks what it is told, and becomes the HTTP process, which holds no model and no torch."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pipeboost.cli.flags import Acceleration, Device, read_config
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import ConfigurationError, MissingPackageError
from pipeboost.core.user_files import make_folder
from pipeboost.generate.loading import ModelSettings

PREFIX = "PIPEBOOST_SERVE"
"""Before the name of a flag, in the environment."""
_model = partial(typer.Option, rich_help_panel="Model")
_network = partial(typer.Option, rich_help_panel="Network")
_keeping = partial(typer.Option, rich_help_panel="Jobs and results")
_time = partial(typer.Option, rich_help_panel="Queue and time; seconds, or as 90s, 30m, 12h, 7d")
_limit = partial(typer.Option, rich_help_panel="Limits of one request")

_Text = str | None
_Texts = list[str] | None
_Number = int | None
_Real = float | None


class ServeCommand(TyperCommand):
    """One whose flags may stand in the environment too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            from pipeboost.serving.settings import check_environment
        except ImportError as error:
            raise MissingPackageError(f"the server needs {error.name}: pip install 'pipeboost[serve]'") from error
        check_environment(os.environ, [parameter.name for parameter in self.params if parameter.name])
        return super().parse_args(ctx, args)


def run_serve(
    ctx: typer.Context,
    acceleration: Acceleration,
    model_path: Annotated[_Text, _model(help="folder of a Diffusers pipeline or a hub id; else the demo model")] = None,
    vae_path: Annotated[_Text, _model(help="folder or hub id of another VAE for it")] = None,
    served_model_name: Annotated[_Text, _model(help="what clients call it; else the last part of its path")] = None,
    lora_dir: Annotated[_Text, _model(help="folder of the safetensors that requests may name")] = None,
    lora_memory: Annotated[_Real, _model(help="GiB that adapters may take (4)")] = None,
    warm_sizes: Annotated[
        _Text, _model(help="run before it is ready: WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, several by commas")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=read_config,
            help="YAML or JSON file: these flags with underscores, and `acceleration:`. Flags win over the "
            f"environment ({PREFIX}_PORT, …), and that over the file",
        ),
    ] = None,
    host: Annotated[_Text, _network(help="address to listen at (127.0.0.1); others need a key")] = None,
    port: Annotated[_Number, _network(help="port; 0: a free one (8000)")] = None,
    api_key: Annotated[_Texts, _network(help="a key that opens the server; may be given several times")] = None,
    api_key_file: Annotated[_Text, _network(help="a key a line")] = None,
    cors_origin: Annotated[_Texts, _network(help="a site whose pages may ask; may be given several times")] = None,
    data_dir: Annotated[_Text, _keeping(help="folder of jobs and results (~/.cache/pipeboost/serve)")] = None,
    retention: Annotated[_Text, _keeping(help="how long results are kept (7d)")] = None,
    disk_budget: Annotated[_Real, _keeping(help="GiB that results may take (20)")] = None,
    upload: Annotated[_Text, _keeping(help="copy results there: s3://, gs://, az:// or file://")] = None,
    log_prompts: Annotated[bool | None, _keeping("--log-prompts", help="write prompts into the log")] = None,
    policy: Annotated[_Text, _time(help="fair among keys and shortest first, or fifo (fair)")] = None,
    max_queue: Annotated[_Number, _time(help="requests that may wait (256)")] = None,
    max_queue_per_key: Annotated[_Number, _time(help="of one key (64)")] = None,
    rate_limit: Annotated[_Text, _time(help="requests of one key, as 60/minute; else any number")] = None,
    max_wait: Annotated[_Text, _time(help="predicted waiting from which on requests are refused (30m)")] = None,
    timeout: Annotated[_Text, _time(help="of one request (1h)")] = None,
    step_timeout: Annotated[_Text, _time(help="a worker without a step for so long is started again (120s)")] = None,
    start_timeout: Annotated[_Text, _time(help="of loading and warming (30m)")] = None,
    drain_timeout: Annotated[_Text, _time(help="for what runs when the server is stopped (30s)")] = None,
    max_body: Annotated[_Real, _limit(help="MiB (64)")] = None,
    max_prompt: Annotated[_Number, _limit(help="characters (10000)")] = None,
    max_pixels: Annotated[_Number, _limit(help="of an output, and of a picture that is sent (16777216)")] = None,
    max_frames: Annotated[_Number, _limit(help="of a video (481)")] = None,
    max_steps: Annotated[_Number, _limit(help="denoising steps (200)")] = None,
    max_images: Annotated[_Number, _limit(help="of one request (10)")] = None,
    allow_image_urls: Annotated[
        bool | None, _limit("--allow-image-urls", help="fetch pictures from the public internet")
    ] = None,
    device: Device = "auto",
) -> None:
    """Serve a model to OpenAI's clients; without any flag, the model we ship."""
    from pipeboost.serving.settings import Settings, checked, save

    given = {name: ctx.params[name] for name in Settings.model_fields if ctx.params.get(name) not in (None, [], ())}
    if warm_sizes is not None:
        given["warm_sizes"] = tuple(warm_sizes.split(","))
    settings = checked({**given, "acceleration": _as_json(ctx.obj, acceleration), "ranks": acceleration.ranks})
    settings.all_keys()
    make_folder(settings.data_dir, f"--data-dir {settings.data_dir}")
    if settings.lora_dir is not None and not settings.lora_dir.is_dir():
        raise ConfigurationError(f"--lora-dir {settings.lora_dir} is no folder")
    ModelSettings.of(
        settings.model_path,
        vae_path=settings.vae_path,
        device=settings.device,
        acceleration=settings.acceleration,
        ranks=settings.ranks,
    )
    path = Path(tempfile.mkdtemp(prefix="pipeboost-")) / "settings.json"
    save(settings, path)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "pipeboost.serving", str(path)])


def _as_json(of_file: Any, acceleration: Acceleration) -> dict[str, Any]:
    """Return the arguments of `accelerate_pipeline` as values that a file can hold."""
    settings = dict(of_file or {}) | acceleration.settings
    layout = settings.get("parallel")
    if isinstance(layout, ParallelConfig):
        defaults = ParallelConfig()
        names = [field.name for field in dataclasses.fields(layout)]
        values = {name: getattr(layout, name) for name in names}
        settings["parallel"] = {name: each for name, each in values.items() if each != getattr(defaults, name)} or None
    return settings
