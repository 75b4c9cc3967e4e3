"""Which norms of a VAE are RMS norms over channels, and which nearest upsampling goes by way of float32 for nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeboost.core.seams import signature_of, stock_class
from pipeboost.kernels.channel_norm import channel_norm

_NEAREST = ("nearest", "nearest-exact")


def is_channel_norm(module: nn.Module) -> bool:
    """Whether a module is an RMS norm over channels with a weight `gamma`: by its attributes, and tried on numbers."""
    gamma, scale = getattr(module, "gamma", None), getattr(module, "scale", None)
    return (
        isinstance(gamma, nn.Parameter)
        and isinstance(scale, float)
        and list(module._parameters) == ["gamma"]
        and not module._buffers
        and not module._modules
        and list(signature_of(stock_class(module), "forward").parameters)[1:] == ["x"]
        and gamma.ndim in (3, 4)
        and gamma.numel() == gamma.shape[0]
        and _norms_as_ours(stock_class(module), tuple(gamma.shape), tuple(sorted(_plain_attributes(module).items())))
    )


def is_nearest_upsampling(module: nn.Module) -> bool:
    """Whether a module of a class of its own is nearest upsampling, which copies values whatever their dtype."""
    if not isinstance(module, nn.Upsample) or module.mode not in _NEAREST or stock_class(module) is nn.Upsample:
        return False
    numbers = torch.arange(12, dtype=torch.bfloat16, device="cpu").reshape(1, 2, 2, 3)
    module_class: Any = stock_class(module)
    with torch.no_grad():
        return torch.equal(module_class.forward(module, numbers), upsample(module, numbers))


def upsample(module: Any, states: torch.Tensor) -> torch.Tensor:
    """Compute the `forward` of a module that `is_nearest_upsampling`, without a copy in float32."""
    return F.interpolate(states, module.size, module.scale_factor, module.mode)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {name: value for name, value in vars(module).items() if type(value) in plain and name != "training"}


@functools.cache
def _norms_as_ours(module_class: Any, shape: tuple[int, ...], attributes: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a module of this class with these attributes computes what `channel_norm` does."""
    generator = torch.Generator().manual_seed(0)
    gamma = torch.randn(shape, generator=generator, device="cpu")
    states = torch.randn((2, *shape[:1], *([2] * (len(shape) - 1))), generator=generator, device="cpu")
    module: Any = module_class.__new__(module_class)
    nn.Module.__init__(module)
    vars(module).update(dict(attributes))
    module.gamma = nn.Parameter(gamma, requires_grad=False)
    with torch.no_grad():
        try:
            theirs = module.forward(states)
        except Exception:  # it needs more than the attributes above, so it is another module
            return False
        ours = channel_norm(states, gamma, module.scale, activate=False)
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-5)
