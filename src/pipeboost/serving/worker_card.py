"""What the worker says of its model, for the server to check requests by before they wait."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pipeboost.generate import LoadedModel
from pipeboost.generate.call_arguments import CallSignature
from pipeboost.generate.outputs import DEFAULT_FPS
from pipeboost.serving.jobs import ModelCard

_WIDTH, _STEPS = 1024, 50
"""For pipelines that say nothing of their own size and steps."""


def card_of(model: LoadedModel, *, plan: str, loras: bool) -> ModelCard:
    """Return the card of a loaded model.

    Args:
        plan: id of its plan.
        loras: whether there are adapters to load.
    """
    pipe, signature = model.pipe, CallSignature(model.pipe)
    defaults = model.settings.request_defaults
    width, height = (_side(pipe, signature, name, defaults) for name in ("width", "height"))
    frames, steps = (
        _default(signature, name, defaults, other)
        for name, other in (("num_frames", 1), ("num_inference_steps", _STEPS))
    )
    return ModelCard(
        pipeline=signature.name,
        kind=model.kind,
        one_frame=model.kind == "video" and _frame_multiple(pipe, frames) is not None,
        parameters=tuple(name for name in signature.parameters if name != "self"),
        size_multiple=signature.size_multiple,
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=steps,
        needs_image=signature.needs_image,
        several_images=signature.takes_several_images,
        takes_mask="mask_image" in signature.parameters,
        quality=pipe.acceleration.plan.quality,
        plan=plan,
        loras=loras and hasattr(pipe, "load_lora_weights"),
        fps=round(own_fps(signature, {})),
        frame_multiple=_frame_multiple(pipe, frames) or 1,
    )


def _default(signature: CallSignature, name: str, defaults: Mapping[str, Any], otherwise: int) -> int:
    parameter = signature.parameters.get(name)
    own = None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
    value = defaults.get(name, own)
    return value if isinstance(value, int) else otherwise


def _side(pipe: Any, signature: CallSignature, name: str, defaults: Mapping[str, Any]) -> int:
    size = getattr(pipe, "default_sample_size", None)
    latent = getattr(pipe, "vae_scale_factor", None)
    own = size * latent if isinstance(size, int) and isinstance(latent, int) else _WIDTH
    return _default(signature, name, defaults, own)


def own_fps(signature: CallSignature, call: Mapping[str, Any]) -> float:
    """Return the frames a second that a call is made for, given or by default."""
    rate = signature.value("frame_rate", call)
    return float(rate) if isinstance(rate, (int, float)) else float(DEFAULT_FPS)


def _frame_multiple(pipe: Any, frames: int) -> int | None:
    """Return what a video has one frame more than a multiple of; None where the VAE encodes no first one by itself."""
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    factor = next(filter(None, (getattr(pipe, name, None) for name in names)), None)
    return factor if isinstance(factor, int) and (frames - 1) % factor == 0 else None
