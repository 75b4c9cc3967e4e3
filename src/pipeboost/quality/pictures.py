"""The pictures and films in what a call returned, as they would be saved: RGB in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

_CHANNELS = (1, 3, 4)
_CHANNELS_OF_TENSORS = (1, 3)
"""Four would be those of latents."""


def pictures_in(result: Any) -> list[np.ndarray]:
    """Return each picture and film of a pipeline's outputs, uint8 `(frames, height, width, 3)`; a picture has 1 frame.

    Taken are PIL images, arrays with channels last, tensors with channels before height and width, and lists of them;
    alpha is left out. Latents look like none of these but by chance: ask only of calls that return pictures.
    """
    outputs = result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple) else (result,)
    return [each for output in outputs for each in _pictures(output, batch=True)]


def _pictures(output: Any, *, batch: bool) -> list[np.ndarray]:
    """Return those of one output; `batch` says whether the first axis of an array counts pictures."""
    if isinstance(output, (list, tuple)):
        frames = [_pictures(each, batch=False) for each in output]
        if not batch and all(isinstance(each, Image.Image) for each in output):
            return [np.concatenate([frame for (frame,) in frames])] if frames else []
        return [each for found in frames for each in found]
    if isinstance(output, Image.Image):
        return [np.asarray(output.convert("RGB"))[None]]
    if isinstance(output, torch.Tensor):
        if output.ndim < 3 or output.shape[-3] not in _CHANNELS_OF_TENSORS:
            return []
        output = output.detach().float().cpu().movedim(-3, -1).numpy()
    is_picture = isinstance(output, np.ndarray) and output.dtype.kind in "fu" and output.ndim >= 3
    if not is_picture or output.shape[-1] not in _CHANNELS:
        return []
    if batch:
        return [each for sample in output for each in _pictures(sample, batch=False)] if output.ndim > 3 else []
    return [_rgb(output if output.ndim == 4 else output[None])] if output.ndim in (3, 4) else []


def _rgb(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8:
        pixels = (np.nan_to_num(pixels, posinf=1.0) * 255).round().clip(0, 255).astype(np.uint8)
    return np.broadcast_to(pixels[..., :3], (*pixels.shape[:3], 3))


def spread(film: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many frames of a film, evenly spaced, the first and the last among them."""
    return film[np.linspace(0, len(film) - 1, min(most, len(film))).round().astype(int)]
