"""What one image or video is asked to be: a `GenerationRequest`; rows, defaults and files of prompts become a batch."""

from __future__ import annotations

import functools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.core.user_files import parse_json, parse_yaml, read_text
from pipeboost.generate.inputs import load_image

FIELDS = (
    "prompt", "negative_prompt", "image_path", "width", "height", "num_frames", "num_inference_steps", "guidance_scale",
    "seed", "call",
)  # fmt: skip
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
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
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigurationError(f"prompt={quoted(self.prompt)} must be a text that is not empty")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigurationError(f"negative_prompt={quoted(self.negative_prompt)} must be a text")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt), *self.call.items()):
            # Bytes that are not UTF-8 become halves of characters on a command line.
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ConfigurationError(f"{name}={quoted(text)} is not text in UTF-8")
        for name in ("width", "height", "num_frames", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and not (_is_integer(value) and value >= 1):
                raise ConfigurationError(f"{name}={quoted(value)} must be an integer of at least 1")
        scale = self.guidance_scale
        is_number = isinstance(scale, float) or _is_integer(scale)
        if scale is not None and not (is_number and is_finite(scale) and scale >= 0):
            raise ConfigurationError(f"guidance_scale={quoted(scale)} must be a finite number of at least 0")
        _check_seed(self.seed)
        for name, value in self.call.items():
            if not is_finite(value):
                raise ConfigurationError(f"call={{{quoted(name)}: {quoted(value)}}} must be made of finite numbers")


def make_requests(
    rows: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], *, of_model: Mapping[str, Any] | None = None
) -> list[GenerationRequest]:
    """A batch: each row's own values win over the defaults, those over the model's, and its pictures are read.

    Request `i` without a seed of its own gets the default seed + `i`; without a default one, a random seed is drawn
    for the batch. What a `call` sets, or a schedule in it implies, the model's own values leave alone.

    Args:
        rows: values of each request, by the names in `FIELDS`.
        defaults: values for all of them; None stands for no value.
        of_model: what the model would be asked for by itself.

    Raises:
        ConfigurationError: there is no row, a value is not allowed, or a picture cannot be read.
    """
    if not rows:
        raise ConfigurationError("there is no prompt; give at least one")
    read: Callable[[Any], Image.Image] = functools.cache(load_image)
    requests = []

    def picture(source: Any) -> Image.Image:
        return read(source) if isinstance(source, (str, os.PathLike)) else load_image(source)

    given, given_call = _checked(defaults)
    model, model_call = _checked(of_model or {})
    first_seed = given.pop("seed", secrets.randbits(31))
    _check_seed(first_seed)
    for index, row in enumerate(rows):
        own, own_call = _checked(row)
        call = {**given_call, **own_call}
        implied = {"num_inference_steps"} if {"sigmas", "timesteps"} & call.keys() else set()
        # The pipeline's own arguments are more particular than a default for all.
        values = {
            **{name: value for name, value in model.items() if name == "prompt" or name not in call.keys() | implied},
            **{name: value for name, value in given.items() if name not in own_call},
            "seed": first_seed + index,
            **own,
        }
        sources = values.pop("image_path", ())
        values["images"] = tuple(map(picture, sources if isinstance(sources, (list, tuple)) else (sources,)))
        values["call"] = {
            name: picture(value) if name.endswith("image") and isinstance(value, (str, Path)) else value
            for name, value in {**model_call, **call}.items()
        }
        requests.append(GenerationRequest(**{"prompt": "", **values}))
    return requests


def _checked(given: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The values that are given, and of them the further arguments of the pipeline's call."""
    values = {name: value for name, value in given.items() if value is not None}
    _check_fields(values, "a request")
    call = values.pop("call", {})
    if not isinstance(call, Mapping) or not all(isinstance(name, str) for name in call):
        raise ConfigurationError(f"call={quoted(call)} must map names of the pipeline's arguments to values")
    return values, call


def _check_seed(seed: object) -> None:
    if not _is_integer(seed) or not 0 <= seed <= LARGEST_SEED:
        raise ConfigurationError(f"seed={quoted(seed)} must be an integer from 0 to {LARGEST_SEED}")


def is_finite(value: Any) -> bool:
    """Whether a number, and every number in a plain value, is finite and no larger than a float can be."""
    if isinstance(value, (Mapping, list, tuple)):
        return all(map(is_finite, value.values() if isinstance(value, Mapping) else value))
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:
        return False


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The requests in a file, in order.

    A `.jsonl` file has a JSON object a line; `.json`, `.yaml` and `.yml` files hold a list; any other file is plain
    text with a prompt a line, where blank lines and lines that begin with `#` are skipped. An entry is a prompt, or a
    mapping with the names in `FIELDS`.

    Raises:
        ConfigurationError: the file is missing, holds no prompt, or an entry is not one.
    """
    what, text = f"prompt file {path}", read_text(path, "prompt file")
    suffix, lines = path.suffix.lower(), text.split("\n")  # as read; splitlines would also end one at U+2028
    if suffix == ".jsonl":
        entries = [parse_json(line, f"{what}, line {n},") for n, line in enumerate(lines, 1) if line.strip()]
    elif suffix in (".json", ".yaml", ".yml"):
        entries = parse_json(text, what) if suffix == ".json" else parse_yaml(text, what)
        if entries is not None and not isinstance(entries, list):
            raise ConfigurationError(f"{what} must hold a list of prompts, not a {type(entries).__name__}")
    else:
        entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        raise ConfigurationError(f"prompt file {path} holds no prompt")
    return [_row(entry, path, number) for number, entry in enumerate(entries, 1)]


def _row(entry: Any, path: Path, number: int) -> dict[str, Any]:
    row = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigurationError(f"prompt file {path}, entry {number}, must be a prompt or a mapping with a prompt")
    _check_fields(row, f"prompt file {path}, entry {number},")
    return row


def _check_fields(names: Iterable[Any], whose: str) -> None:
    for name in names:
        if name not in FIELDS:
            raise ConfigurationError(f"{whose} has no field {quoted(name)}; it may have {', '.join(FIELDS)}")
