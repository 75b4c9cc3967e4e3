"""`WorkerModel`: one loaded, accelerated model that runs jobs; what a job's result depends on is the job alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeboost.acceleration import accelerate_pipeline
from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import Cancelled, ConfigurationError, UnsupportedError, quoted
from pipeboost.core.seams import stock_class
from pipeboost.distributed import suspend_timeout, world_size
from pipeboost.generate import Generated, GeneratedImage, GeneratedVideo, LoadedModel
from pipeboost.generate.call_arguments import CallSignature
from pipeboost.generate.inputs import load_image
from pipeboost.generate.loading import ModelSettings
from pipeboost.generate.requests import GenerationRequest
from pipeboost.generate.session import requests_of
from pipeboost.serving.jobs import ModelCard
from pipeboost.serving.wire import Ran, Start, WorkerSettings
from pipeboost.serving.worker_card import card_of, own_fps
from pipeboost.serving.worker_loras import Loras
from pipeboost.serving.worker_previews import Previews
from pipeboost.stages import Progress
from pipeboost.stages.report import Report

_WARM_STEPS = 4
_LOW = CacheConfig(extrapolate="output", step_mask="ultra", taylorseer_order=1)
_OWNER = "owner_of_prompts"
"""Attribute of the pipeline. Prompt reuse keys by all attributes, so that no owner's prompt is found for another."""


class WorkerModel:
    """A model and its adapters.

    Args:
        settings: what to load.
        on_status: receives a few words as each part begins.

    Attributes:
        card: what the server is to know of it.

    Raises:
        PipeboostError: it cannot be loaded or accelerated as asked.
    """

    def __init__(self, settings: WorkerSettings, *, on_status: Callable[[str], None]) -> None:
        given = ModelSettings.of(
            settings.model_path,
            vae_path=settings.vae_path,
            device=settings.device,
            acceleration=settings.acceleration,
        )
        self.model = LoadedModel(given, on_status=on_status)
        # Each of several ranks would do all of the work.
        if world_size() > 1 and not (parallel := self.pipe.acceleration.plan["parallel"]).on:
            raise UnsupportedError(
                f"{world_size()} ranks would each compute the whole model ({parallel.why}); start one rank"
            )
        acceleration = self.pipe.acceleration
        self._config, self._skips_steps = acceleration.config, acceleration.plan["cache"].on
        folder = None if settings.lora_dir is None else Path(settings.lora_dir)
        self.loras = Loras(self.pipe, folder, round(settings.lora_memory * 2**30))
        self.card: ModelCard = card_of(self.model, plan=self.plan_id, loras=folder is not None)

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.model.pipe

    @property
    def plan_id(self) -> str:
        """The tier, and a digest of what was decided for each feature."""
        plan = self.pipe.acceleration.plan
        decided = sorted((name, each.choice, repr(each.settings)) for name, each in plan.decisions.items())
        text = repr((plan.model.pipeline, plan.hardware.device, world_size(), decided))
        return f"{plan.quality}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def warm(self, size: Sequence[int]) -> None:
        """Run a call of a size, so that what it compiles is there.

        Raises:
            PipeboostError: the model cannot make that size.
        """
        request: dict[str, Any] = dict(zip(("width", "height", "num_frames"), size, strict=False))
        request |= {"seed": 0, "num_inference_steps": min(_WARM_STEPS, self.card.num_inference_steps)}
        if self.card.needs_image:
            request["image_path"] = Image.new("RGB", (size[0], size[1]))
        for _ in self.model.generate(requests_of(self.model.settings, ["a warm-up"], request)):
            pass

    def run(
        self,
        start: Start,
        *,
        advance: Callable[[str, int, int], None],
        preview: Callable[[Path], None],
        is_stopped: Callable[[], bool],
    ) -> Ran:
        """Run a job and write its arrays.

        Args:
            advance: called with a stage, and with steps of all outputs together.
            preview: called with the file of a picture on the way.
            is_stopped: whether the job was cancelled, asked at each stage and step; of several ranks one need know.

        Raises:
            Cancelled: it was.
            PipeboostError: the model found fault with the call.
            OSError: the arrays cannot be written.
        """
        alone, count = world_size() == 1, start.call.count
        advance("preparing", 0, 0)
        requests = self._requests(start)
        with suspend_timeout("loading adapters"):
            self._set_cache(start.call.cache)
            self.loras.use(start.call.loras)
        vars(self.pipe)[_OWNER] = start.owner
        reports: list[Report] = []
        arrays: list[Path] = []
        previews, notes, steps, done = Previews(start.call.previews), dict[str, None](), 0, 0

        def listen(progress: Progress) -> None:
            nonlocal steps, done
            if is_stopped():
                if alone:
                    raise Cancelled("the job was cancelled")
                self.pipe.acceleration.cancel()  # all ranks then raise at the same step
            steps = progress.steps or steps
            done = max(done, len(reports) * steps + (progress.step or 0))
            advance(progress.stage, done, count * steps)
            picture = previews.picture_at(progress) if _is_first_rank() else None
            if picture is not None:
                try:
                    preview(_written(start.folder, f"preview-{len(reports)}-{progress.step}", picture))
                except OSError as error:  # the result may yet find room
                    previews.notes = (f"no previews: {error.strerror or type(error).__name__}",)

        start.folder.mkdir(parents=True, exist_ok=True)
        outputs = self.model.generate(requests, progress=listen)
        for index in range(count):
            if alone and is_stopped():  # of several ranks, none may leave out what the others run
                raise Cancelled("the job was cancelled")
            made = next(outputs)
            reports.append(made.report)
            notes |= dict.fromkeys(made.notes)
            if _is_first_rank():
                arrays.append(_written(start.folder, f"output-{index}", _pixels(made, start.kind)))
        return Ran(
            arrays=tuple(arrays),
            seeds=tuple(each.seed for each in requests),
            plan=self.plan_id,
            steps=len(reports[0].steps),
            seconds=sum(report.seconds for report in reports),
            stages=_summed(reports),
            fps=own_fps(CallSignature(self.pipe), requests[0].call) if start.kind == "video" else None,
            notes=(*notes, *previews.notes),
        )

    def _set_cache(self, quality: str | None) -> None:
        """Let the calls skip more steps, as the server was started, or none. Where it skips none, all are alike.

        Raises:
            ConfigurationError: there is no such quality.
        """
        ways = {None: self._config.cache, "low": _LOW, "medium": self._config.cache, "high": None}
        if quality not in ways:
            raise ConfigurationError(f"quality={quoted(quality)} is not allowed; use low, medium or high")
        wanted = ways[quality] if self._skips_steps else self._config.cache
        if wanted != self.pipe.acceleration.config.cache:
            accelerate_pipeline(self.pipe, config=replace(self._config, cache=wanted))

    def _requests(self, start: Start) -> list[GenerationRequest]:
        """Return a request for each output.

        Raises:
            ConfigurationError: a picture cannot be read, or an argument would be read as one.
            UnsupportedError: the model makes nothing of this kind.
        """
        call, name = start.call, stock_class(self.pipe).__name__
        if call.count < 1:
            raise ConfigurationError(f"n={call.count} must be at least 1")
        arguments, frames = dict(call.arguments), call.num_frames
        for argument in arguments:
            if argument.endswith("image"):  # of which a text would be taken for a path
                raise ConfigurationError(f"{argument} cannot be given as an argument; upload the picture")
        if start.kind == "video" and self.model.kind != "video":
            raise UnsupportedError(f"{name} makes images; use /v1/images")
        if start.kind == "image" and self.model.kind == "video":
            if not self.card.one_frame:
                raise UnsupportedError(f"{name} makes videos; use /v1/videos")
            if frames not in (None, 1):
                raise ConfigurationError(f"num_frames={frames} makes no image; leave it out")
            frames = 1
        if call.mask is not None:
            if not self.card.takes_mask:
                raise UnsupportedError(f"{name} takes no mask; leave it out")
            arguments["mask_image"] = _picture(start.folder, call.mask, "mask")
        request = {
            "negative_prompt": call.negative_prompt,
            "image_path": [_picture(start.folder, each, "image") for each in call.images],
            "width": call.width,
            "height": call.height,
            "num_frames": frames,
            "num_inference_steps": call.num_inference_steps,
            "guidance_scale": call.guidance_scale,
            "seed": call.seed,
            "call": arguments,
        }
        return requests_of(self.model.settings, [call.prompt] * call.count, request)


def _picture(folder: Path, name: str, what: str) -> Image.Image:
    """Read a picture of a job.

    Raises:
        ConfigurationError: it is none; the sentence names no path.
    """
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise ConfigurationError(f"{what} {quoted(name)} is not a file of the job")
    try:
        return load_image(folder / name)
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace(f"{folder}{os.sep}", "")) from error


def _pixels(made: Generated, kind: str) -> np.ndarray:
    """Return an output as uint8 `(height, width, channels)`, of a video with frames in front."""
    if isinstance(made, GeneratedVideo):
        return made.frames[0] if kind == "image" else made.frames
    assert isinstance(made, GeneratedImage)
    pixels = np.asarray(made.image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _written(folder: Path, name: str, pixels: np.ndarray) -> Path:
    """Write an array that is whole or not there."""
    target, temporary = folder / f"{name}.npy", folder / f".{name}.part"
    try:
        with temporary.open("wb") as file:
            pixels, layout = np.ascontiguousarray(pixels), np.lib.format
            layout.write_array_header_1_0(file, layout.header_data_from_array_1_0(pixels))
            file.write(pixels.data)  # numpy's own way would hide what the system says of a full disk
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _summed(reports: Sequence[Report]) -> Mapping[str, float]:
    stages: dict[str, float] = {}
    for report in reports:
        for stage, seconds in report.stages.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    return stages


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0
