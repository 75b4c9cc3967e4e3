"""A request → the arguments of one stock pipeline's `__call__`, read from its signature and its components.

Whatever the pipeline would ignore, round or trip over is refused here, before anything runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pipeboost.core.errors import ConfigurationError, UnsupportedError, quoted
from pipeboost.core.seams import stock_class
from pipeboost.generate.ignored import guidance_acts, refuse_ignored
from pipeboost.generate.requests import GenerationRequest

Kind = Literal["image", "video"]

# As the model cards of Qwen-Image word "no negative prompt"; without any, the pipelines leave true CFG out.
_NO_NEGATIVE_PROMPT = " "
LONGEST_SIDE = 16384
"""Pixels: far more than any model was trained for, and few enough that a mistake does not run for hours."""
_OURS = (
    "self", "prompt", "prompt_embeds", "negative_prompt", "image", "generator", "output_type", "return_dict",
    "num_images_per_prompt", "num_videos_per_prompt", "callback_on_step_end",
)  # fmt: skip

_OF_REQUESTS = ("width", "height", "num_frames", "num_inference_steps", "negative_prompt")
_PLAIN = (bool, int, float, str, list, tuple, dict)


class CallSignature:
    """What one pipeline can be asked for.

    Attributes:
        name: class name of the pipeline.
        parameters: parameters of its `__call__`, by name.
        cfg_scale: the one of them that switches classifier-free guidance on; None where none does.
    """

    def __init__(self, pipe: Any) -> None:
        cls = stock_class(pipe)
        self.pipe = pipe
        self.name = cls.__name__
        signature = inspect.signature(cls.__call__)
        self.parameters = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        self.cfg_scale = next((name for name in ("true_cfg_scale", "guidance_scale") if name in self.parameters), None)
        self._outputs = _output_fields(signature.return_annotation)

    def value(self, name: str, call: Mapping[str, Any]) -> Any:
        """What an argument is in a call: as given, or by default; None where the pipeline has no such argument."""
        return call.get(name, self.parameters[name].default) if name in self.parameters else None

    @cached_property
    def kind(self) -> Kind:
        """What it makes.

        Raises:
            UnsupportedError: neither images nor videos.
        """
        if "num_frames" in self.parameters or "frames" in self._outputs:
            return "video"
        if "images" in self._outputs or not self._outputs:
            return "image"
        raise UnsupportedError(f"{self.name} makes {', '.join(self._outputs)}, neither images nor videos")

    @cached_property
    def guidance(self) -> str | None:
        """The argument that `guidance_scale` stands for: true CFG where the model has no guidance embedding."""
        embedded = any(
            getattr(getattr(component, "config", None), "guidance_embeds", False)
            for component in self.pipe.components.values()
        )
        given = self.parameters.get("guidance_scale")
        if "true_cfg_scale" in self.parameters and (given is None or given.default is None or not embedded):
            return "true_cfg_scale"
        return None if given is None else "guidance_scale"

    @cached_property
    def takes_several_images(self) -> bool:
        """Whether one request may have several pictures; elsewhere a list would mean several requests."""
        methods = (getattr(self.pipe, name, None) for name in ("prepare_latents", "prepare_image_latents"))
        return any("images" in inspect.signature(method).parameters for method in methods if method is not None)

    @cached_property
    def needs_image(self) -> bool:
        """Whether it cannot run without a picture."""
        if "image" not in self.parameters:
            return False
        required = self.parameters["image"].default is inspect.Parameter.empty
        encoded = "image" in inspect.signature(self.pipe.encode_prompt).parameters
        return required or encoded or "strength" in self.parameters or "mask_image" in self.parameters

    @cached_property
    def size_multiple(self) -> int:
        """What widths and heights must be multiples of: pixels of a latent, times those that a token takes."""
        pipe = self.pipe
        latent = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(pipe, "vae_scale_factor", None) or 1
        patch = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "patch_size", None) or 1
        patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
        multiple = int(latent) * int(patch)
        for name in ("image_processor", "video_processor"):
            config = getattr(getattr(pipe, name, None), "config", None)
            multiple = math.lcm(multiple, int(getattr(config, "vae_scale_factor", None) or 1))
        return multiple

    def arguments(self, request: GenerationRequest) -> dict[str, Any]:
        """The call's arguments, without a generator and an output type.

        Raises:
            ConfigurationError: a size, a number of frames or a picture that the pipeline cannot use.
            UnsupportedError: something that the pipeline has no argument for.
        """
        arguments: dict[str, Any] = {"prompt": request.prompt}
        own = {name: getattr(request, name) for name in _OF_REQUESTS}
        own[self.guidance or "guidance_scale"] = request.guidance_scale
        for name, value in own.items():
            if value is not None:
                self._require(name, value)
                arguments[name] = value
        for name, value in self._own(request.call).items():
            if name in arguments and arguments[name] != value:
                raise ConfigurationError(
                    f"call={{{name!r}: {quoted(value)}}} contradicts {name}={arguments[name]}; leave one of them out"
                )
            arguments[name] = value
        self._check_size(arguments)
        given = {name: value for name, value in arguments.items() if name not in ("prompt", self.guidance)}
        refuse_ignored(self, arguments, given)
        negative = {"negative_prompt", "negative_prompt_embeds"}
        unguided = "negative_prompt" in self.parameters and not negative & arguments.keys()
        if unguided and self.cfg_scale == "true_cfg_scale" and guidance_acts(self, arguments):
            arguments["negative_prompt"] = _NO_NEGATIVE_PROMPT
        arguments |= self._images(request)
        if "max_area" in self.parameters and {"width", "height"} <= arguments.keys():
            # Kontext keeps only the aspect ratio of a size, and scales it to this area.
            arguments.setdefault("max_area", arguments["width"] * arguments["height"])
        return arguments

    def _require(self, name: str, value: Any) -> None:
        if name not in self.parameters:
            raise UnsupportedError(
                f"{name}={quoted(value)}: {self.name}, which makes {self.kind}s, has no such argument; leave it out"
            )

    def _own(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        for name, value in call.items():
            if name in _OURS:
                raise ConfigurationError(f"call={{{name!r}: ...}} is not allowed, generate sets it; leave it out")
            self._require(name, value)
            wanted = self.parameters[name].annotation
            if value is not None and not _may_be(value, wanted):
                kind = inspect.formatannotation(wanted).replace("NoneType", "None")
                raise ConfigurationError(f"call={{{name!r}: {quoted(value)}}}: {self.name} takes {kind}; leave it out")
            is_count = name in ("width", "height") or name.startswith("num_") or name.endswith("_length")
            if is_count and isinstance(value, int) and value < 1:
                raise ConfigurationError(f"call={{{name!r}: {value}}} must be an integer of at least 1")
            if name in ("true_cfg_scale", "guidance_scale", "guidance_scale_2") and value is not None and value < 0:
                raise ConfigurationError(f"call={{{name!r}: {quoted(value)}}} must be a number of at least 0")
        return call

    def _check_size(self, arguments: Mapping[str, Any]) -> None:
        multiple = self.size_multiple
        for name in ("width", "height"):
            value = arguments.get(name)
            if value is not None and value > LONGEST_SIDE:
                raise ConfigurationError(f"{name}={value} is more than {LONGEST_SIDE}; use a smaller one")
            if value is not None and value % multiple:
                below = value // multiple * multiple
                near = f"{below} or {below + multiple}" if below else f"{multiple}"
                raise ConfigurationError(
                    f"{name}={value} is not a multiple of {multiple}, as {self.name} needs; use {near}"
                )
        frames = arguments.get("num_frames")
        names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        factor = next(filter(None, (getattr(self.pipe, name, None) for name in names)), None)
        if frames is None or factor is None:
            return
        # Not every video VAE encodes the first frame by itself: the pipeline's own default shows whether this one does.
        default = self.parameters["num_frames"].default
        if isinstance(default, int) and (default - 1) % factor == 0 and (frames - 1) % factor:
            below = (frames - 1) // factor * factor + 1
            raise ConfigurationError(
                f"num_frames={frames} is not one more than a multiple of {factor}, as {self.name} needs; "
                f"use {below} or {below + factor}"
            )

    def _images(self, request: GenerationRequest) -> dict[str, Any]:
        images = list(request.images)
        if not images:
            if self.needs_image:
                raise ConfigurationError(f"{self.name} needs an image to start from; give one with image_path")
            return {}
        if "image" not in self.parameters:
            raise UnsupportedError(
                f"image_path: {self.name} makes {self.kind}s from text alone; leave the image out, or load a model "
                "that edits or animates one"
            )
        if len(images) > 1 and not self.takes_several_images:
            raise UnsupportedError(f"image_path names {len(images)} images, but {self.name} takes one per request")
        return {"image": images if self.takes_several_images else images[0]}


def _may_be(value: Any, annotation: Any) -> bool:
    """Whether a plain value, as files and flags have them, is what an annotation asks for.

    Whatever is not plain may be: annotations of pipelines say `torch.FloatTensor` where pictures are taken too.
    """
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(_may_be(value, each) for each in typing.get_args(annotation))
    kind: Any = typing.get_origin(annotation) or annotation
    if not isinstance(value, _PLAIN) or not isinstance(kind, type) or kind is inspect.Parameter.empty:
        return True
    if isinstance(value, (list, tuple)) and kind in (list, tuple):
        inner = typing.get_args(annotation)
        return kind is tuple or not inner or all(_may_be(each, inner[0]) for each in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, (bool, int) if kind is bool else kind)


def _output_fields(annotation: Any) -> tuple[str, ...]:
    """Field names of the output class in a return annotation such as `FluxPipelineOutput | tuple`."""
    for cls in typing.get_args(annotation) or (annotation,):
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            return tuple(field.name for field in dataclasses.fields(cls))
    return ()
