"""What one image or video is asked to be: a `Request`, and how rows and defaults become a batch of them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.generate.inputs import load_image

FIELDS = (
    "prompt",
    "negative_prompt",
    "image_path",
    "width",
    "height",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "call",
)
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image or video; None leaves a value to the pipeline.

    Attributes:
        prompt: what to show.
        seed: of the CPU generator that all its noise comes from, so that it does not depend on the device.
        images: pictures to edit or to start from.
        call: further arguments of the pipeline's `__call__`, such as `{"max_sequence_length": 256}`.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    images: tuple[Image.Image, ...] = ()
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.call, Mapping):
            raise ConfigurationError(f"call={quoted(self.call)} must map names of the pipeline's arguments to values")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigurationError(f"prompt={quoted(self.prompt)} must be a text that is not empty")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigurationError(f"negative_prompt={quoted(self.negative_prompt)} must be a text")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt), *self.call.items()):
            if isinstance(text, str) and not _is_unicode(text):
                raise ConfigurationError(f"{name}={quoted(text)} is not text in UTF-8")
        for name in ("width", "height", "num_frames", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and not (_is_integer(value) and value >= 1):
                raise ConfigurationError(f"{name}={quoted(value)} must be an integer of at least 1")
        scale = self.guidance_scale
        is_number = isinstance(scale, float) or _is_integer(scale)
        if scale is not None and not (is_number and is_finite(scale) and scale >= 0):
            raise ConfigurationError(f"guidance_scale={quoted(scale)} must be a number of at least 0")
        if not _is_integer(self.seed) or not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigurationError(f"seed={quoted(self.seed)} must be an integer from 0 to {LARGEST_SEED}")
        for name, value in self.call.items():
            if not is_finite(value):
                raise ConfigurationError(f"call={{{quoted(name)}: {quoted(value)}}} must be made of finite numbers")


def make_requests(
    rows: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], *, of_model: Mapping[str, Any] | None = None
) -> list[Request]:
    """A batch: each row's own values win over the defaults, those over the model's, and its pictures are read.

    Request `i` without a seed of its own gets the default seed + `i`; without a default one, a random seed is drawn
    for the batch.

    Args:
        rows: values of each request, by the names in `FIELDS`.
        defaults: values for all of them; None stands for no value.
        of_model: what the model would be asked for by itself.

    Raises:
        ConfigurationError: there is no row, a value is not allowed, or a picture cannot be read.
    """
    if not rows:
        raise ConfigurationError("there is no prompt; give at least one")
    given = {name: value for name, value in defaults.items() if value is not None}
    first_seed = given.pop("seed", None)
    if first_seed is None:
        first_seed = secrets.randbits(31)
    pictures: dict[str, Image.Image] = {}
    requests = []
    for index, row in enumerate(rows):
        own = {name: value for name, value in row.items() if value is not None}
        # The pipeline's own arguments are more particular than a default for all.
        values = {name: value for name, value in given.items() if name not in _mapping(own.get("call"))} | own
        for name in values:
            if name not in FIELDS:
                raise ConfigurationError(f"a request has no field {quoted(name)}; it may have {', '.join(FIELDS)}")
        if "seed" not in values:
            if not _is_integer(first_seed):
                raise ConfigurationError(f"seed={quoted(first_seed)} must be an integer from 0 to {LARGEST_SEED}")
            values["seed"] = first_seed + index
        values["images"] = tuple(_picture(source, pictures) for source in _listed(values.pop("image_path", ())))
        if isinstance(values.get("call", {}), Mapping):
            _add_defaults(values, own, given, of_model or {})
            values["call"] = {
                name: _picture(value, pictures) if name.endswith("image") and isinstance(value, (str, Path)) else value
                for name, value in values["call"].items()
            }
        requests.append(Request(**{"prompt": "", **values}))
    return requests


def _add_defaults(
    values: dict[str, Any], own: Mapping[str, Any], given: Mapping[str, Any], of_model: Mapping[str, Any]
) -> None:
    """Complete a request by what it leaves open; nothing that its `call` sets, or that a schedule in it implies."""
    call = {**_mapping(given.get("call")), **_mapping(own.get("call"))}
    implied = {"num_inference_steps"} if {"sigmas", "timesteps"} & call.keys() else set()
    for name, value in of_model.items():
        if name not in call.keys() | implied:
            values.setdefault(name, value)
    values["call"] = {**_mapping(of_model.get("call")), **call}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def is_finite(value: Any) -> bool:
    """Whether a number, and every number in a plain value, is finite and no larger than a float can be."""
    if isinstance(value, Mapping):
        return all(is_finite(each) for each in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_finite(each) for each in value)
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:
        return False


def _picture(source: Any, known: dict[str, Image.Image]) -> Image.Image:
    if isinstance(source, Image.Image):
        return load_image(source)
    return known.setdefault(str(source), known.get(str(source)) or load_image(source))


def _listed(value: Any) -> Sequence[Any]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a character, which bytes that are not UTF-8 become on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
