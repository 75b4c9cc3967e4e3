"""A loaded, accelerated pipeline that stays warm between requests, and is freed at the end of a `with` block."""

from __future__ import annotations

import contextlib
import gc
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from pipeboost.core.errors import ConfigurationError, PipeboostError, UnsupportedError, one_line, quoted
from pipeboost.core.seams import stock_class
from pipeboost.features.offload.budget import in_gib
from pipeboost.generate.call_arguments import CallSignature, Kind
from pipeboost.generate.loading import ModelSettings, load_pipeline
from pipeboost.generate.outputs import DEFAULT_FPS, Generated, GeneratedImage, GeneratedVideo, check_fps
from pipeboost.generate.requests import GenerationRequest, make_requests
from pipeboost.generate.truncation import Truncations
from pipeboost.stages.report import component_bytes

if TYPE_CHECKING:
    from pipeboost.stages import Progress


Prompts: TypeAlias = "str | Sequence[str] | None"


@dataclass(frozen=True)
class LoadedComponent:
    """The weights of a component as they were loaded: their bytes, and the device that they are on."""

    bytes: int
    device: str


class LoadedModel:
    """One pipeline in memory; `pipeboost.load_model` makes it.

    Attributes:
        settings: what it was loaded from.
        pipe: the accelerated pipeline; its handle is at `pipe.acceleration`.
        kind: `"image"` or `"video"`, what it makes.
        components: name → bytes and device of its weights, as they were loaded.
    """

    def __init__(self, settings: ModelSettings, *, on_status: Callable[[str], None] = lambda text: None) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._pipe: Any = load_pipeline(settings, on_status)
        self.kind: Kind = CallSignature(self._pipe).kind
        self._truncations = Truncations(self._pipe)
        self.components = {
            name: LoadedComponent(weight, next(self._pipe.components[name].parameters()).device.type)
            for name, weight in component_bytes(self._pipe.components).items()
            if weight
        }

    @property
    def memory_line(self) -> str:
        """The memory of each component, in words."""
        parts = (f"{name} {in_gib(each.bytes)} on {each.device}" for name, each in self.components.items())
        return f"loaded {in_gib(sum(each.bytes for each in self.components.values()))}: {', '.join(parts)}"

    @property
    def pipe(self) -> Any:
        if self._pipe is None:
            raise PipeboostError("this model was freed; load it again")
        return self._pipe

    def generate_image(self, prompt: Prompts = None, **request: Any) -> Any:
        """One image for a prompt, a list of them for a list; the arguments are those of `pipeboost.generate_image`."""
        return self.generate_all("image", prompt, requests_of(self.settings, prompt, request))

    def generate_video(self, prompt: Prompts = None, *, fps: int = DEFAULT_FPS, **request: Any) -> Any:
        """One video for a prompt, a list of them for a list; the arguments are those of `pipeboost.generate_video`."""
        return self.generate_all("video", prompt, requests_of(self.settings, prompt, request), fps=fps)

    def generate_all(
        self, kind: Kind, prompt: Any, requests: Sequence[GenerationRequest], *, fps: int = DEFAULT_FPS
    ) -> Any:
        """Return what `generate` makes of all requests: a list where `prompt` is one.

        Raises:
            UnsupportedError: the model makes the other kind.
        """
        if self.kind != kind:
            raise UnsupportedError(f"{stock_class(self.pipe).__name__} makes {self.kind}s; use generate_{self.kind}")
        made = list(self.generate(requests, fps=fps))
        return made if isinstance(prompt, (list, tuple)) else made[0]

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        fps: int = DEFAULT_FPS,
        progress: Callable[[Progress], None] | None = None,
        profiled: bool = False,
        warm_up: bool = False,
    ) -> Iterator[Generated]:
        """Make each request's output, in order, as the iterator is read.

        Args:
            requests: all of them are checked before the first one runs.
            fps: frame rate that videos are saved at.
            progress: called at each stage and step of the running request.
            profiled: measure each stage's own peak memory.
            warm_up: make the first request's output once more at the start, so that no report shows compiling.

        Raises:
            PipeboostError: a request that this model cannot serve; nothing has run then.
        """
        check_fps(fps)
        signature, calls = CallSignature(self.pipe), []
        name = signature.name
        for request in requests:
            # As numbers, since a picture shows one that is not finite as black.
            call = {**signature.arguments(request), "output_type": "np"}
            calls.append((request, call, signature.value("max_sequence_length", call)))

        def outputs() -> Iterator[Generated]:  # holds no model, which may be freed before its end
            for index, (request, call, text_limit) in enumerate(calls):
                # Not held between outputs: whoever stops reading must not keep the model from others.
                with self._lock:
                    acceleration = self.pipe.acceleration
                    peaks = acceleration.profiled() if profiled else contextlib.nullcontext()
                    acceleration.progress = progress
                    self._truncations.begin(call, text_limit)
                    try:
                        with peaks, _call_errors(name, call):
                            if warm_up and index == 0:
                                acceleration.warm_up(**call, generator=_generator(request.seed))
                            output = self.pipe(**call, generator=_generator(request.seed))
                    finally:
                        acceleration.progress = None
                    report, cut = acceleration.report(), self._truncations.notes()
                video = self.kind == "video"
                pixels = _pixels(output.frames[0] if video else output.images[0], name)
                drawn = {"width": pixels.shape[-2], "height": pixels.shape[-3]}
                drawn |= {"num_frames": len(pixels)} if video else {}
                changed = tuple(
                    f"{key} is {value}, not {call[key]} as asked for: the pipeline changed it"
                    for key, value in drawn.items()
                    if call.get(key) not in (None, value)
                )
                common = {"prompt": request.prompt, "seed": request.seed, "report": report, "notes": changed + cut}
                if video:
                    yield GeneratedVideo(**common, frames=pixels, fps=fps)
                else:
                    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
                    yield GeneratedImage(**common, image=picture)

        return outputs()

    def close(self) -> None:
        """Free the model's memory. Harmless when repeated."""
        with self._lock:
            if self._pipe is None:
                return
            self._truncations.remove()
            self._pipe.acceleration.remove()
            self._pipe = None
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _pixels(made: Any, name: str) -> Any:
    """What a pipeline made, in [0, 1], as bytes."""
    if isinstance(made, Image.Image):
        return np.asarray(made.convert("RGBA" if "A" in made.mode else "RGB"))
    made = np.asarray(made)
    if not np.isfinite(made).all():
        raise PipeboostError(
            f"{name} made a picture of numbers that are not finite, so it was not kept: a value of the call is out of "
            "its range (such as guidance_scale or sigmas), or the weights overflow in their dtype"
        )
    return (made * 255).round().clip(0, 255).astype(np.uint8)


def requests_of(settings: ModelSettings, prompt: Prompts, request: Mapping[str, Any]) -> list[GenerationRequest]:
    """The requests that a caller's prompt or prompts and other values stand for, with the model's own defaults."""
    prompts = prompt if isinstance(prompt, (list, tuple)) else () if prompt is None else (prompt,)
    if not all(isinstance(each, str) for each in prompts):
        raise ConfigurationError(f"prompt={quoted(prompt)} must be a text or a list of texts")
    rows: list[dict[str, Any]] = [{}] if prompt is None else [{"prompt": each} for each in prompts]
    return make_requests(rows, request, of_model=settings.request_defaults)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@contextlib.contextmanager
def _call_errors(name: str, call: Mapping[str, Any]) -> Iterator[None]:
    """Turn what the pipeline's own check of its inputs refuses, and too little memory, into one sentence."""
    try:
        yield
    except RuntimeError as error:
        of_the_gpu = isinstance(error, torch.OutOfMemoryError)
        if not of_the_gpu and "DefaultCPUAllocator" not in str(error):
            given = [f"{key} of shape {tuple(each.shape)}" for key, each in call.items() if torch.is_tensor(each)]
            if not given:
                raise
            raise ConfigurationError(f"{name} cannot run with {', '.join(given)}: {one_line(error)}") from error
        size = ", ".join(f"{key}={call[key]}" for key in ("width", "height", "num_frames") if key in call)
        raise PipeboostError(
            f"{name} ran out of the {'GPU' if of_the_gpu else 'host'}'s memory{f' at {size}' if size else ''}; make it "
            f"smaller{', or set offload' if of_the_gpu else ''}"
        ) from error
    except (ValueError, TypeError) as error:
        # Else the pipeline failed over its arguments, rather than found fault with them.
        ran = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if isinstance(error, PipeboostError) or not ran & {"check_inputs", "retrieve_timesteps"}:
            raise
        raise ConfigurationError(f"{name} refused the request: {one_line(error)}") from error
