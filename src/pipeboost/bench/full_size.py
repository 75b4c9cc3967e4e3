"""A published model size with random weights, in a stock pipeline without encoders and VAE.

Speed does not depend on the weights' values; cache hit rates and image quality do, so neither is read off such a model.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch

from pipeboost.contract.registry import families
from pipeboost.core.errors import UnsupportedError, not_one_of
from pipeboost.core.families import FullSize

_SEED = 0
_CALL_ARGUMENTS = {
    "hidden_states": "latents",
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
}


def full_size_named(name: str) -> FullSize:
    """Return the published size that a family declares under this name.

    Raises:
        ConfigurationError: no family declares it; the message lists what they declare.
    """
    if name not in full_sizes():
        raise not_one_of("model", name, full_sizes())
    return full_sizes()[name]


def full_sizes() -> dict[str, FullSize]:
    """Return all published sizes that the families declare, by name."""
    return {size.name: size for family in families() for size in family.full_sizes}


def parameter_count(size: FullSize) -> int:
    """Return the parameters of its transformer, counted without building any."""
    import diffusers

    with torch.device("meta"):
        transformer = getattr(diffusers, size.transformer)(**size.config)
    return sum(parameter.numel() for parameter in transformer.parameters())


def build_pipeline(size: FullSize, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a stock pipeline of this size: the same random weights every time, the default scheduler, nothing else.

    What Diffusers keeps in fp32 when it loads a checkpoint is in fp32 here too.
    """
    import diffusers

    transformer_class = getattr(diffusers, size.transformer)
    before = torch.get_default_dtype()
    with seeded(device), torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            transformer = transformer_class(**size.config)
        finally:
            torch.set_default_dtype(before)
    transformer.eval().requires_grad_(False)
    kept = transformer_class._keep_in_fp32_modules or ()
    for name, parameter in transformer.named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()

    pipeline_class = getattr(diffusers, size.pipeline)
    parameters = inspect.signature(pipeline_class).parameters.values()
    components: dict[str, Any] = {item.name: None for item in parameters if item.default is inspect.Parameter.empty}
    components |= {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    pipe = pipeline_class(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def forward_inputs(size: FullSize, *, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of one transformer forward, the same random values every time."""
    with seeded(device):
        return size.inputs(device, dtype)


def call_arguments(pipe: Any, inputs: dict[str, Any], *, steps: int) -> dict[str, Any]:
    """Return arguments for `pipe(...)` that make its denoising loop run on these inputs, without encoders and VAE.

    Guidance is the pipeline's default, with a negative prompt where it takes one.

    Raises:
        UnsupportedError: packed latents that are not of a square image.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    arguments = {
        call: inputs[forward].clone()
        for forward, call in _CALL_ARGUMENTS.items()
        if call in accepted and inputs.get(forward) is not None
    }
    for name in tuple(arguments):
        if f"negative_{name}" in accepted:
            arguments[f"negative_{name}"] = arguments[name].clone()
    latents = arguments["latents"]
    if latents.ndim == 5:
        frames, height, width = latents.shape[2:]
        arguments["num_frames"] = (frames - 1) * pipe.vae_scale_factor_temporal + 1
        arguments["height"] = height * pipe.vae_scale_factor_spatial
        arguments["width"] = width * pipe.vae_scale_factor_spatial
    else:
        side = math.isqrt(latents.shape[1])
        if side**2 != latents.shape[1]:
            raise UnsupportedError(
                f"steps needs the image's height and width, and {latents.shape[1]} packed latents are not a square "
                "image; use steps=0"
            )
        arguments["height"] = arguments["width"] = side * 2 * pipe.vae_scale_factor
    return {**arguments, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers every time inside, and the caller's own ones afterwards."""
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_SEED)
        yield
