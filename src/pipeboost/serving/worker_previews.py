"""Pictures of a call on its way: the VAE on the latents of evenly spread steps."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from pipeboost.contract.call import Call, current_call, no_call
from pipeboost.stages import Progress
from pipeboost.stages.instrument import TRAJECTORY, Trajectory

_UNPACK = ["latents", "height", "width", "vae_scale_factor"]
"""Parameters of the `_unpack_latents` of pipelines that lay latents out as tokens of four."""


class Previews:
    """Those of one job.

    Args:
        count: of each output.

    Attributes:
        notes: why there are none, in a sentence; empty where there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.notes: tuple[str, ...] = ()

    def picture_at(self, progress: Progress) -> np.ndarray | None:
        """Return the picture of a step, uint8 `(height, width, 3)`; None for most. Inside the call, once a step.

        It reads the latents and changes nothing, so that the output is the same to the bit.
        """
        call = current_call()
        if not self._count or self.notes or call is None:
            return None
        trajectory = call.get(TRAJECTORY)
        if trajectory is None:
            trajectory = call[TRAJECTORY] = Trajectory()
        if progress.step is None or not trajectory.latents:
            return None
        latents = trajectory.latents[-1]
        trajectory.latents.clear()
        trajectory.timesteps.clear()
        if progress.step not in preview_steps(self._count, progress.steps or 0):
            return None
        why = _why_not(call)
        if why:
            self.notes = (f"no previews: {why}",)
            return None
        with no_call(), torch.no_grad():
            return _decoded(call, latents)


def preview_steps(count: int, steps: int) -> set[int]:
    """Return after which of a call's steps it is shown: as evenly as can be, and not after the last."""
    return {round(steps * (number + 1) / (count + 1)) for number in range(count)} - {0, steps}


def _why_not(call: Call) -> str:
    pipe = call.pipe
    vae, unpack = getattr(pipe, "vae", None), getattr(pipe, "_unpack_latents", None)
    if not hasattr(vae, "decode"):
        return "the pipeline has no VAE"
    if call.has("offload") and call.features is not None:
        return "the VAE is offloaded while the model denoises"
    if unpack is not None and list(inspect.signature(unpack).parameters) != _UNPACK:
        return "the pipeline's latents are laid out in a way of its own"
    return ""


def _decoded(call: Call, latents: torch.Tensor) -> np.ndarray:
    pipe, vae = call.pipe, call.pipe.vae
    if hasattr(pipe, "_unpack_latents"):
        height, width = (call.arguments.get(name) or _side(pipe) for name in ("height", "width"))
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    latents = latents[:1, :, :1] if latents.ndim == 5 else latents[:1]
    config = vae.config
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, deviation = (torch.tensor(each).view(shape).to(latents) for each in (mean, deviation))
        latents = latents * deviation + mean
    else:
        latents = latents / config.get("scaling_factor", 1.0) + (config.get("shift_factor") or 0.0)
    sample: Any = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    picture = sample[0, :, 0] if sample.ndim == 5 else sample[0]
    scaled = (picture.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.permute(1, 2, 0).cpu().numpy()


def _side(pipe: Any) -> int:
    return int(pipe.default_sample_size * pipe.vae_scale_factor)
