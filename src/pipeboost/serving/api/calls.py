"""Fields of a request → the call that the worker runs, checked by what its model takes and by the server's limits."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeboost.core.errors import quoted, shortened
from pipeboost.serving.api.errors import ApiError, bad
from pipeboost.serving.api.fields import LARGEST_SEED, Common, ImageFields, VideoFields
from pipeboost.serving.jobs import Call, Lora, ModelCard
from pipeboost.serving.settings import Settings

_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
_TIERS = ("fast", "balanced", "lossless", "exact")
_MOST_LORAS = 8
# What an argument of the pipeline's call is named by, where a request names it otherwise.
_ARGUMENTS = ("guidance_scale_2", "true_cfg_scale", "flow_shift", "strength")


def image_call(
    fields: ImageFields, card: ModelCard, settings: Settings, *, pictures: int = 0, mask: bool = False
) -> Call:
    """Return the call for a request of images.

    Args:
        pictures: how many came with it.

    Raises:
        ApiError: something that the model or the server cannot do.
    """
    if card.kind != "image" and not card.one_frame:
        raise bad("model", f"{settings.model_name} makes videos; use /v1/videos", "wrong_model_kind")
    if fields.n > settings.max_images:
        raise bad("n", f"n={fields.n} is more than this server makes at once; use at most {settings.max_images}")
    if fields.output_compression not in (None, 100) and fields.output_format == "png":
        raise bad("output_compression", f"output_compression={fields.output_compression} is for jpeg and webp; png has "
                  "no loss, so leave it out or name another output_format")  # fmt: skip
    if fields.partial_images and not fields.stream:
        raise bad("partial_images", f"partial_images={fields.partial_images} needs stream=true")
    if fields.stream and fields.n > 1:
        raise bad("n", f"n={fields.n} cannot be streamed; use n=1, or leave stream out")
    if fields.stream and fields.response_format == "url":
        raise bad("response_format", "response_format='url' cannot be streamed; leave it or stream out")
    frames = 1 if card.kind == "video" else None
    return _call(fields, card, settings, count=fields.n, frames=frames, pictures=pictures, mask=mask,
                 previews=fields.partial_images)  # fmt: skip


def video_call(fields: VideoFields, card: ModelCard, settings: Settings, *, pictures: int = 0) -> Call:
    """Return the call for a request of a video.

    Raises:
        ApiError: something that the model or the server cannot do.
    """
    if card.kind != "video":
        raise bad("model", f"{settings.model_name} makes images; use /v1/images/generations", "wrong_model_kind")
    frames = fields.num_frames
    if fields.seconds is not None:
        if not re.fullmatch(r"\d{1,4}(\.\d{1,3})?", text := str(fields.seconds)) or float(text) <= 0:
            raise bad("seconds", f"seconds={quoted(fields.seconds)} must be a number above 0, as '4'")
        wanted = round(float(text) * (fields.fps or card.fps) / card.frame_multiple) * card.frame_multiple + 1
        if frames not in (None, wanted):
            raise bad("seconds", f"seconds={text} is {wanted} frames, which contradicts num_frames={frames}; send one")
        frames = wanted
    frames = card.num_frames if frames is None else frames
    if (frames - 1) % card.frame_multiple:
        below = (frames - 1) // card.frame_multiple * card.frame_multiple + 1
        raise bad("num_frames", f"num_frames={frames} must be one more than a multiple of {card.frame_multiple}; use "
                  f"{below} or {below + card.frame_multiple}")  # fmt: skip
    if frames > settings.max_frames:
        param = "num_frames" if fields.num_frames else "seconds"
        raise bad(param, f"{frames} frames are more than this server makes; use at most {settings.max_frames}")
    call = _call(fields, card, settings, frames=frames, pictures=pictures)
    if fields.fps is not None and "frame_rate" in card.parameters:
        return Call(**{**vars(call), "arguments": {**call.arguments, "frame_rate": fields.fps}})
    return call


def _call(
    fields: Common,
    card: ModelCard,
    settings: Settings,
    *,
    count: int = 1,
    frames: int | None,
    pictures: int,
    mask: bool = False,
    previews: int = 0,
) -> Call:
    check_model(fields.model, settings)
    _check_texts(fields, settings)
    width, height = _size(fields, card, settings)
    steps = fields.num_inference_steps
    if steps is not None and steps > settings.max_steps:
        raise bad("num_inference_steps", f"num_inference_steps={steps} is more than this server runs; use at most "
                  f"{settings.max_steps}")  # fmt: skip
    for name in ("negative_prompt", *_ARGUMENTS):
        if (value := getattr(fields, name)) is not None and name not in card.parameters:
            raise bad(name, f"{name}={quoted(value)}: {card.pipeline} has no such argument; leave it out",
                      "unsupported_parameter")  # fmt: skip
    _check_pictures(card, pictures, mask)
    seed = secrets.randbits(31) if fields.seed is None else fields.seed
    if seed + count - 1 > LARGEST_SEED:
        raise bad(
            "seed", f"seed={seed} leaves no room for {count} outputs, which have seed, seed + 1, …; use a smaller one"
        )
    arguments = {name: value for name in _ARGUMENTS if (value := getattr(fields, name)) is not None}
    return Call(
        prompt=fields.prompt,
        seed=seed,
        count=count,
        negative_prompt=fields.negative_prompt,
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=fields.guidance_scale,
        images=tuple(f"input_{number}.png" for number in range(pictures)),
        mask="mask.png" if mask else None,
        arguments=arguments,
        loras=_loras(fields, card, settings),
        cache=_cache(fields, card),
        previews=previews,
    )


def check_model(name: str | None, settings: Settings) -> None:
    """Refuse another model than the one there is."""
    if name not in (None, settings.model_name):
        raise ApiError(404, f"model={quoted(name)} is not served here; use {settings.model_name!r}, or leave it out",
                       param="model", code="model_not_found")  # fmt: skip


def _check_texts(fields: Common, settings: Settings) -> None:
    if not fields.prompt.strip():
        raise bad("prompt", "prompt is empty; say what to show", "empty_prompt")
    for name in ("prompt", "negative_prompt"):
        text = getattr(fields, name) or ""
        if len(text) > settings.max_prompt:
            raise bad(name, f"{name} has {len(text)} characters, more than {settings.max_prompt}", "string_too_long")
        if any("\ud800" <= letter <= "\udfff" for letter in text) or "\0" in text:
            raise bad(name, f"{name} is not text in UTF-8, or holds NUL")


def _size(fields: Common, card: ModelCard, settings: Settings) -> tuple[int | None, int | None]:
    width, height = fields.width, fields.height
    if fields.size not in (None, "auto"):
        if not (match := _SIZE.fullmatch(fields.size or "")):
            raise bad("size", f"size={quoted(fields.size)} must be auto or WIDTHxHEIGHT, as {card.width}x{card.height}")
        named = int(match[1]), int(match[2])
        if width not in (None, named[0]) or height not in (None, named[1]):
            raise bad("size", f"size={fields.size} contradicts width={width}, height={height}; send one of them")
        width, height = named
    multiple = card.size_multiple
    for name, value in (("width", width), ("height", height)):
        if value is not None and value % multiple:
            below = value // multiple * multiple
            near = f"{below} or {below + multiple}" if below else f"{multiple}"
            param = name if getattr(fields, name) else "size"
            raise bad(param, f"{name}={value} is not a multiple of {multiple}, as {card.pipeline} needs; use {near}")
    if (pixels := (width or card.width) * (height or card.height)) > settings.max_pixels:
        side = math.isqrt(settings.max_pixels) // multiple * multiple
        shown = f"{width or card.width}x{height or card.height}"
        param = "size" if fields.size else "width"
        raise bad(param, f"{shown} is {pixels} pixels, more than {settings.max_pixels}; use {side}x{side} or less")
    return width, height


def _check_pictures(card: ModelCard, pictures: int, mask: bool) -> None:
    if pictures and "image" not in card.parameters:
        raise bad(
            "image", f"{card.pipeline} makes {card.kind}s from text alone; send no picture", "unsupported_parameter"
        )
    if not pictures and card.needs_image:
        raise bad("image", f"{card.pipeline} needs a picture to start from; send one", "missing_required_parameter")
    if pictures > 1 and not card.several_images:
        raise bad("image", f"{card.pipeline} takes one picture, not {pictures}", "unsupported_parameter")
    if mask and not card.takes_mask:
        raise bad("mask", f"{card.pipeline} takes no mask; leave it out", "unsupported_parameter")


def _cache(fields: Common, card: ModelCard) -> str | None:
    """Return the caching that a quality stands for; precision is the server's."""
    quality = fields.quality
    if quality in ("low", "medium", "high"):
        return quality
    wanted = {"xhigh": "lossless", "max": "lossless", "extra-high": "lossless"}.get(quality, quality)
    if wanted in _TIERS and _TIERS.index(wanted) > _TIERS.index(card.quality):
        raise bad("quality", f"quality={quality!r} is above {card.quality!r}, which the server was started with; use "
                  "low, medium, high or auto")  # fmt: skip
    return None


def _loras(fields: Common, card: ModelCard, settings: Settings) -> tuple[Lora, ...]:
    if fields.lora is not None and fields.loras is not None:
        raise bad("loras", "lora and loras are both there; send one of them")
    param = "loras" if fields.loras is not None else "lora"
    given = getattr(fields, param)
    if isinstance(given, str) and given.lstrip()[:1] in ("{", "["):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise bad(param, f"{param}={quoted(given)} is not valid JSON") from None
    entries = [] if given is None else given if isinstance(given, list) else [given]
    if len(entries) > _MOST_LORAS:
        raise bad(param, f"{param} names {len(entries)} adapters; use at most {_MOST_LORAS}")
    known = lora_names(settings.lora_dir)
    found = tuple(_lora(each, param, known) for each in entries)
    if found and not card.loras:
        raise bad(param, f"{card.pipeline} takes no LoRA; leave it out", "unsupported_parameter")
    if len({each.name for each in found}) < len(found):
        raise bad(param, f"{param} names an adapter twice; name each once, with its scale")
    return found


def lora_names(folder: Path | None) -> list[str]:
    """Return the names of the adapters in a folder."""
    if folder is None or not folder.is_dir():
        return []
    return sorted(
        path.stem for path in folder.glob("*.safetensors") if path.is_file() and not path.name.startswith(".")
    )


def _lora(entry: Any, param: str, known: Collection[str]) -> Lora:
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not given.keys() <= {"name", "path", "scale"}:
        raise bad(param, f"{param}={quoted(entry)} must be a name, or an object with name and scale")
    named = [given[key] for key in ("name", "path") if key in given]
    if len(named) == 2 and named[0] != named[1]:
        raise bad(param, f"{param}={quoted(entry)} has both a name and a path; send the name")
    name = named[0] if named else None
    if not isinstance(name, str) or name.removesuffix(".safetensors") not in known:
        there = f"there are {shortened(', '.join(known), 300)}" if known else "this server has none"
        raise bad(param, f"{param} {quoted(name)} is no adapter of this server; {there}", "unknown_lora")
    try:
        scale = float(given.get("scale", 1.0))
    except (TypeError, ValueError):
        scale = math.nan
    if isinstance(given.get("scale"), bool) or not math.isfinite(scale) or abs(scale) > 100:
        raise bad(param, f"{param}[scale]={quoted(given.get('scale'))} must be a number from -100 to 100")
    return Lora(name.removesuffix(".safetensors"), scale)
