"""`parallelize_vae`: the ranks of a call share each forward of a VAE's encoder and decoder, every rank some rows.

The seam is around the encoder and the decoder, inside everything that the VAE itself does: slicing, tiling, frame by
frame caches and blending stay stock. With tiling on, the ranks share each tile.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeboost.contract.call import Slot, current_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.sharding import Autoencoder
from pipeboost.distributed import SAMPLE, Group
from pipeboost.features.parallel.vae_functions import FunctionsOfStrip, Strip
from pipeboost.features.parallel.vae_structure import Structure, structure_of

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
