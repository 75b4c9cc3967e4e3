"""`parallelize_vae`: the ranks of a call share each forward of a VAE's encoder and decoder, every rank some rows.

The seam is around the encoder and the decoder, inside everything that the VAE itself does: slicing, tiling, frame by
frame caches and blending stay stock. With tiling on, the ranks share each tile.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import Autoencoder
from pipeboost.distributed import SAMPLE, Group
from pipeboost.features.parallel.vae_layers import share_attention, share_convolution, share_group_norm
from pipeboost.features.parallel.vae_strip import Strip, current_strip, working_on
from pipeboost.features.parallel.vae_structure import why_not_parallel

PARTS = ("encoder", "decoder")
VAE_FORWARDS = Slot[Counter[str]](Counter)


def parallelize_vae(
    vae: nn.Module, autoencoder: Autoencoder | None, ledger: Ledger, *, owner: object | None = None
) -> dict[str, str]:
    """Let the ranks that work on one sample share the encoder's and the decoder's forwards.

    Acts in calls that have `"parallel"` and a mesh with several such ranks; gradients are not for it. All ranks end
    with the whole result, which differs from the undivided one by rounding. A map with fewer latent rows and columns
    than ranks is not divided. `call[VAE_FORWARDS]` has both: `"decoder shared"`, `"decoder whole: <reason>"`.

    Args:
        vae: may belong to several pipelines, each call having its own ranks.
        autoencoder: what it is made of; None where no family says so.
        ledger: takes the inverse.
        owner: the acceleration in whose calls ranks share; it is not kept alive. None: in all.

    Returns:
        Encoder and decoder as far as ranks do not share them, each with the reason.
    """
    left = {part: reason for part in PARTS if (reason := why_not_parallel(getattr(vae, part, None), autoencoder))}
    shared = tuple(part for part in PARTS if part not in left)
    if shared and autoencoder is not None:
        known = autoencoder

        def apply(inner: Ledger) -> None:
            for part in shared:
                _share_modules(getattr(vae, part), known, inner)

        ledger.share(vae, "VAE parallelism", autoencoder, apply)
        for part in shared:
            ledger.add_middleware(
                getattr(vae, part), "__call__", _Divide(getattr(vae, part), part, owner), place="component.strips"
            )
    return left


def _share_modules(part: nn.Module, autoencoder: Autoencoder, ledger: Ledger) -> None:
    for module in part.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            share_convolution(module, ledger)
        elif isinstance(module, nn.GroupNorm):
            share_group_norm(module, ledger)
        elif autoencoder.attends(stock_class(module).__name__):
            share_attention(module, ledger)


class _Divide:
    """The layer on an encoder or a decoder, which is called `part`; see `parallelize_vae`."""

    def __init__(self, module: nn.Module, part: str, owner: object | None) -> None:
        convolutions = [each for each in module.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d))]
        self.part = part
        # Pixels of its input that are one row of the latent map, and how far its largest convolution looks.
        self.unit = math.prod(each.stride[-1] for each in convolutions)
        self.reach = max(each.kernel_size[dim] // 2 for each in convolutions for dim in (-2, -1))
        self._owner = None if owner is None else weakref.ref(owner)

    def __call__(
        self, call_next: Callable[..., torch.Tensor], owner: nn.Module, states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        call = current_call()
        group = None if call is None else self._group(call)
        if call is None or group is None:
            return call_next(states, *args, **kwargs)
        counts = call[VAE_FORWARDS]
        strip = self._strip(group, states)
        if isinstance(strip, str):
            counts[f"{self.part} whole: {strip}"] += 1
            return call_next(states, *args, **kwargs)
        counts[f"{self.part} shared"] += 1
        with working_on(strip):
            own = call_next(strip.cut(states), *args, **kwargs)
        return strip.gather(own)

    def _group(self, call: Call) -> Group | None:
        ours = self._owner is None or self._owner() is call.owner
        if call.mesh is None or not ours or not call.has("parallel") or current_strip() is not None:
            return None
        group = call.mesh.group(*SAMPLE)
        return group if group.size > 1 else None

    def _strip(self, group: Group, states: torch.Tensor) -> Strip | str:
        height, width = states.shape[-2:]
        if torch.is_grad_enabled():
            return "gradients are on"
        if states.device.type != group.device:
            return f"it is on {states.device.type}, the ranks' group on {group.device}"
        if height % self.unit or width % self.unit:
            return f"{height} x {width} is not a multiple of {self.unit}"
        # Longer strips have less border between them.
        dim, length, breadth = (-2, height, width) if height >= width else (-1, width, height)
        if length // self.unit < group.size * self.reach:
            return f"{length // self.unit} latent rows are too few for {group.size} ranks"
        return Strip(group, dim=dim, rows=length // self.unit, breadth=breadth // self.unit, device=states.device)
