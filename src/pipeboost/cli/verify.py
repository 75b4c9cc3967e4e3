"""`pipeboost verify`: whether a model, accelerated, keeps the promise of its tier here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from pipeboost.cli.flags import (
    Acceleration,
    CallArguments,
    Config,
    Device,
    GuidanceScale,
    Height,
    ImagePath,
    LoraPath,
    ModelPath,
    NegativePrompt,
    NumFrames,
    Steps,
    VaePath,
    Width,
)
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.user_files import make_folder, user_path
from pipeboost.distributed import world, world_size
from pipeboost.generate import LoadedModel
from pipeboost.generate.call_arguments import CallSignature
from pipeboost.generate.loading import ModelSettings
from pipeboost.generate.requests import FIELDS, GenerationRequest
from pipeboost.quality import Verification


def run_verify(
    ctx: typer.Context,
    acceleration: Acceleration,
    model_path: ModelPath = None,
    vae_path: VaePath = None,
    lora_path: LoraPath = None,
    config: Config = None,
    prompt: Annotated[str | None, typer.Option(help="what to show; else the demo model's own")] = None,
    negative_prompt: NegativePrompt = None,
    image_path: ImagePath = None,
    width: Width = None,
    height: Height = None,
    num_frames: NumFrames = None,
    num_inference_steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="of all runs")] = 0,
    call: CallArguments = None,
    per_block: Annotated[bool, typer.Option("--per-block", help="also compare each block on stock's inputs")] = False,
    output: Annotated[Path | None, typer.Option(help="folder for verification.json and contact_sheet.png")] = None,
    device: Device = "auto",
) -> int:
    """Compare a model's stock and accelerated outputs; exit code 1 where the promise of the tier is not kept."""
    from pipeboost.cli.generate import on_rank, requests_from
    from pipeboost.distributed.launch import launch

    if output is not None:
        output = user_path(output, "--output")
        make_folder(output, f"--output {output}")
    settings = ModelSettings.of(
        model_path,
        vae_path=vae_path,
        lora_path=lora_path or (),
        device=device,
        acceleration={**(ctx.obj or {}), **acceleration.settings},
        ranks=acceleration.ranks,
    )
    given: Mapping[str, Any] = {name: ctx.params[name] for name in FIELDS if name not in ("prompt", "call")}
    prompts = () if prompt is None else (prompt,)
    (request,) = requests_from(prompts, None, {**given, "call": call or ()}, settings.request_defaults)
    if acceleration.ranks == world_size():
        result = _verified(settings, request, per_block)
    else:
        result = launch(on_rank, _verified, settings, request, per_block, num_gpus=acceleration.ranks)
    if world().rank == 0:
        Console().print(str(result), soft_wrap=True, highlight=False, markup=False)
        if output is not None:
            result.save(output)
    return 0 if result.passed else 1


def _verified(settings: ModelSettings, request: GenerationRequest, per_block: bool) -> Verification:
    with quiet_libraries(), LoadedModel(settings) as model:
        arguments = CallSignature(model.pipe).arguments(request)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        verified: Verification = model.pipe.acceleration.verify(per_block=per_block, generator=generator, **arguments)
    return verified
