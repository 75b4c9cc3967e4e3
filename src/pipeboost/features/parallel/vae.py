"""`parallelize_vae`: the ranks of a call share each forward of a VAE's encoder and decoder, every rank one strip.

The seam is around the encoder and the decoder, inside everything that the VAE itself does: slicing, tiling, frame by
frame caches and blending stay stock. With tiling on, the ranks share each tile. They share a forward only where every
module of the encoder or decoder is one that can be shared.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeboost.contract.call import Slot, current_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import Autoencoder
from pipeboost.distributed import SAMPLE, Group
from pipeboost.features.parallel.vae_functions import FunctionsOfStrip, Strip

_PER_PIXEL = (
    *(nn.Sequential, nn.ModuleList, nn.Identity, nn.Dropout, nn.Linear, nn.GroupNorm, nn.ZeroPad2d),
    *(nn.SiLU, nn.ReLU, nn.GELU, nn.Mish, nn.Tanh),
)
_UPSAMPLING = ("nearest", "nearest-exact")


@dataclass(frozen=True)
class Structure:
    """What dividing the map of an encoder or decoder depends on.

    Attributes:
        stride: pixels of its input that are one row of the latent map.
        reach: how many pixels beyond its own its largest convolution looks.
        attention: how many of its modules attend to the whole map.
    """

    stride: int
    reach: int
    attention: int


def structure_of(part: nn.Module, autoencoder: Autoencoder | None) -> Structure | str:
    """Return the structure of an encoder or decoder, or why ranks cannot share its forwards."""
    if autoencoder is None:
        return "its family does not say what it is made of"
    convolutions = []
    for module in part.modules():
        reason = _why_not(module, autoencoder)
        if reason is not None:
            return reason
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            convolutions.append(module)
    vertical, horizontal = (math.prod(each.stride[dim] for each in convolutions) for dim in (-2, -1))
    if vertical != horizontal:
        return "it scales height and width differently"
    reach = max(each.kernel_size[dim] // 2 for each in convolutions for dim in (-2, -1))
    classes = Counter(stock_class(module).__name__ for module in part.modules())
    return Structure(vertical, reach, sum(classes[name] for name in {name for name, _ in autoencoder.attention}))


def _why_not(module: nn.Module, autoencoder: Autoencoder) -> str | None:
    cls = stock_class(module)
    name = cls.__name__
    declared = name in autoencoder.local
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        known = declared or cls in (nn.Conv2d, nn.Conv3d)
        return _why_not_convolution(module) if known else f"{name} is not known"
    if isinstance(module, nn.Upsample):
        factors = module.scale_factor if isinstance(module.scale_factor, tuple) else (module.scale_factor,)
        whole = module.size is None and all(each is not None and float(each).is_integer() for each in factors)
        known = (declared or cls is nn.Upsample) and module.mode in _UPSAMPLING and whole
        return None if known else f"upsampling by {module.scale_factor}, {module.mode}"
    processors = [processor for attention, processor in autoencoder.attention if attention == name]
    if processors:
        processor = getattr(module, "processor", None)
        given = "" if processor is None else stock_class(processor).__name__
        return None if given in processors else f"its attention processor {given} is not known"
    return None if declared or cls in _PER_PIXEL else f"{name} is not known"


def _why_not_convolution(module: nn.Conv2d | nn.Conv3d) -> str | None:
    """Return why ranks cannot share a convolution; None where they can.

    With a kernel of 3 or more along a dimension it keeps the extent (stride 1) or halves it (stride 2), given an even
    one. What it does not pad itself was padded before it: by half a kernel on both sides where the stride is 1, by one
    pixel behind or by one on both sides where it is 2.
    """
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"padding {module.padding_mode!r} inside a convolution"
    for dim in (-2, -1):
        kernel, stride, padding = module.kernel_size[dim], module.stride[dim], module.padding[dim]
        known = module.dilation[dim] == 1 and (
            (kernel == 1 and stride == 1 and padding == 0)
            or (kernel % 2 == 1 and kernel > 1 and stride == 1 and padding in (0, kernel // 2))
            or (kernel == 3 and stride == 2 and padding in (0, 1))
        )
        if not known:
            return f"a convolution with kernel {kernel}, stride {stride} and padding {padding}"
    return None


PARTS = ("encoder", "decoder")
VAE_FORWARDS = Slot[Counter[str]](Counter)


def parallelize_vae(
    vae: nn.Module, autoencoder: Autoencoder | None, ledger: Ledger, *, owner: object | None = None
) -> None:
    """Let the ranks that work on one sample share the encoder's and the decoder's forwards.

    Acts in calls that have `"parallel"` and a mesh with several such ranks; gradients are not for it. All ranks end
    with the whole result, which differs from the undivided one by rounding. What cannot be divided, such as a map with
    fewer latent rows and columns than ranks, every rank computes whole. `call[VAE_FORWARDS]` counts both:
    `"decoder shared"`, `"decoder whole: <reason>"`.

    Args:
        vae: may belong to several pipelines, each call having its own ranks.
        autoencoder: what it is made of; None where no family says so.
        ledger: takes the inverse.
        owner: the acceleration in whose calls ranks share; it is not kept alive. None: in all.
    """
    acceleration = None if owner is None else weakref.ref(owner)
    for name in PARTS:
        part = getattr(vae, name, None)
        if part is not None:
            divided = functools.partial(_divided, name, autoencoder, acceleration)
            ledger.add_middleware(part, "__call__", divided, place="component.strips")


def _divided(
    name: str,
    autoencoder: Autoencoder | None,
    acceleration: weakref.ref[Any] | None,
    call_next: Callable[..., torch.Tensor],
    part: nn.Module,
    states: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    call = current_call()
    if call is None or call.mesh is None or not call.has("parallel") or call.mesh.group(*SAMPLE).size == 1:
        return call_next(states, *args, **kwargs)
    if acceleration is not None and acceleration() is not call.owner:
        return call_next(states, *args, **kwargs)
    counts = call[VAE_FORWARDS]
    structure = structure_of(part, autoencoder)
    strip = structure if isinstance(structure, str) else _strip(structure, call.mesh.group(*SAMPLE), states)
    if isinstance(structure, str) or isinstance(strip, str):
        counts[f"{name} whole: {strip}"] += 1
        return call_next(states, *args, **kwargs)
    counts[f"{name} shared"] += 1
    with FunctionsOfStrip(strip) as functions:
        own = call_next(strip.cut(states), *args, **kwargs)
    if functions.attended < structure.attention:
        raise UnsupportedError(
            f"attention in the VAE's {name} does not use torch's scaled_dot_product_attention, so that ranks cannot "
            "share it; restore it or use ParallelConfig(vae=False)"
        )
    return strip.gather(own)


def _strip(structure: Structure, group: Group, states: torch.Tensor) -> Strip | str:
    """Return this rank's strip of a map, or why ranks cannot share the map."""
    height, width = states.shape[-2:]
    if torch.is_grad_enabled():
        return "gradients are on"
    if states.device.type != group.device:
        return f"it is on {states.device.type}, the ranks' group on {group.device}"
    if height % structure.stride or width % structure.stride:
        return f"{height} x {width} is not a multiple of {structure.stride}"
    # Longer strips have less border between them.
    dim, length, breadth = (-2, height, width) if height >= width else (-1, width, height)
    rows = length // structure.stride
    if rows < group.size * structure.reach:
        return f"{rows} latent rows are too few for {group.size} ranks"
    return Strip(group, dim=dim, rows=rows, breadth=breadth // structure.stride, device=states.device)
