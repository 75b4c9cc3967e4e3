"""Rewrites a video VAE for the length of our calls: the same terms summed, with fewer passes over memory.

Found by structure, so that they hold for any VAE made of such modules. They act on each module's `forward`, inside
hooks, caches of frames, tiles and slices, and what ranks that share a map put in place of torch's functions.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn import functional as F

from pipeboost.contract.call import current_call
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import Middleware, middleware_of, stock_class
from pipeboost.core.sharding import Autoencoder
from pipeboost.features.compile.vae.causal_conv import convolve_causally, in_channels_last, is_causal
from pipeboost.features.compile.vae.channel_norm import is_channel_norm, is_nearest_upsampling, upsample
from pipeboost.kernels.channel_norm import channel_norm

REWRITES = ("causal_conv", "channels_last", "nearest", "channel_norm")
"""Convolutions over frames without zeros around them, convolutions with the channels of a pixel side by side, nearest
upsampling in its own dtype, RMS norm and activation in one pass."""
PARTS = ("encoder", "decoder")
_PLACE = "submodule.rewrite"
_ACTIVATED = "_pipeboost_activated"
"""Set on a tensor that has been through its activation already."""

_rewritten: weakref.WeakKeyDictionary[nn.Module, RewrittenVae] = weakref.WeakKeyDictionary()


class RewrittenVae:
    """A VAE with rewrites, and in whose calls they act.

    Attributes:
        owners: the accelerations.
        every_call: whether they act in all calls.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self.every_call = False

    @property
    def acts(self) -> bool:
        """Whether the rewrites act in the call that this thread is in."""
        call = current_call()
        return call is not None and (self.every_call or call.owner in self.owners)

    def step_back(self) -> None:
        """Take the rewrites off, for all that hold the VAE."""
        self._ledger.undo()


def is_rewritable(vae: nn.Module) -> bool:
    """Whether a VAE has convolutions that are rewritten; without them its layout is not worth changing."""
    return any(map(is_causal, vae.modules()))


def is_compiled(vae: nn.Module) -> bool:
    """Whether the user compiled a VAE or wrapped its methods, and what is captured is to be as they left it."""
    return bool({"encode", "decode"} & vars(vae).keys()) or any(
        module._compiled_call_impl is not None or isinstance(module, OptimizedModule) for module in vae.modules()
    )


def step_back_where_compiled(vae: nn.Module) -> None:
    """Take the rewrites off a VAE that the user has compiled since: Dynamo cannot capture what is wrapped."""
    rewritten = _rewritten.get(vae)
    if rewritten is not None and is_compiled(vae):
        rewritten.step_back()


def rewrite_vae(
    vae: nn.Module,
    autoencoder: Autoencoder | None,
    ledger: Ledger,
    *,
    owner: Any = None,
    rewrites: Collection[str] = REWRITES,
) -> None:
    """Rewrite a VAE that `is_rewritable` in the calls of an acceleration; undone by the ledger.

    Args:
        vae: the VAE.
        autoencoder: what it is made of; None where no family says so.
        ledger: takes the inverse.
        owner: the acceleration; None for every call.
        rewrites: which, of `REWRITES`.
    """

    def apply(inner: Ledger) -> None:
        rewritten = RewrittenVae(inner)
        inner.record("rewritten VAE", functools.partial(_forget, weakref.ref(vae)))
        activated = {} if autoencoder is None else autoencoder.activated
        for module in vae.modules():
            for name in activated.get(stock_class(module).__name__, ()) if "channel_norm" in rewrites else ():
                norm, activation = getattr(module, name), module.nonlinearity
                if type(activation) is nn.SiLU and is_channel_norm(norm):
                    inner.add_middleware(norm, "forward", _activated_norm(rewritten, activation), place=_PLACE)
                    inner.add_middleware(activation, "forward", _pass_activated, place=_PLACE)
        for module in vae.modules():
            middleware = _middleware_for(module, rewrites, rewritten)
            if middleware is not None and not middleware_of(module, "forward"):
                inner.add_middleware(module, "forward", middleware, place=_PLACE)
        step_back = _step_back_first(weakref.ref(vae))
        doors = [(vae, method) for method in ("encode", "decode", "__call__")]
        doors += [(getattr(vae, name), "__call__") for name in PARTS if isinstance(getattr(vae, name, None), nn.Module)]
        for door, method in doors:
            if callable(getattr(stock_class(door), method, None)):
                inner.add_middleware(door, method, step_back, place="component.rewrite")
        _rewritten[vae] = rewritten

    ledger.share(vae, "VAE rewrites", tuple(rewrites), apply)
    rewritten = _rewritten.get(vae)
    if rewritten is None:  # it stepped back
        return
    if owner is None:
        rewritten.every_call = True
    else:
        ledger.record("calls with a rewritten VAE", functools.partial(rewritten.owners.discard, owner))
        rewritten.owners.add(owner)


def _step_back_first(reference: weakref.ref[nn.Module]) -> Middleware:
    def run(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        vae = reference()
        if vae is not None and current_call() is None:  # which looks as it begins
            step_back_where_compiled(vae)
        return call_next(*args, **kwargs)

    return run


def _forget(reference: weakref.ref[nn.Module]) -> None:
    vae = reference()
    if vae is not None:
        _rewritten.pop(vae, None)


def _middleware_for(module: nn.Module, rewrites: Collection[str], rewritten: RewrittenVae) -> Middleware | None:
    if "causal_conv" in rewrites and is_causal(module):
        return _causal_conv(rewritten, channels_last="channels_last" in rewrites)
    if "channels_last" in rewrites and stock_class(module) is nn.Conv2d and module.padding_mode == "zeros":
        return _conv(rewritten)
    if "nearest" in rewrites and is_nearest_upsampling(module):
        return _nearest(rewritten)
    if "channel_norm" in rewrites and is_channel_norm(module):
        return _channel_norm(rewritten)
    return None


def _causal_conv(rewritten: RewrittenVae, channels_last: bool) -> Middleware:
    def convolve(call_next: Callable[..., Any], module: Any, x: Any, cache_x: Any = None) -> torch.Tensor:
        if not rewritten.acts:
            return call_next(x, cache_x)
        return convolve_causally(module, x, cache_x, channels_last=channels_last)

    return convolve


def _conv(rewritten: RewrittenVae) -> Middleware:
    def convolve(call_next: Callable[..., Any], module: Any, x: Any) -> torch.Tensor:
        if not rewritten.acts:
            return call_next(x)
        weight = in_channels_last(module.weight)
        return F.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups)

    return convolve


def _nearest(rewritten: RewrittenVae) -> Middleware:
    def copy_values(call_next: Callable[..., Any], module: Any, x: Any) -> torch.Tensor:
        # Stock rounds to float32 what is more exact.
        return upsample(module, x) if rewritten.acts and x.dtype != torch.float64 else call_next(x)

    return copy_values


def _channel_norm(rewritten: RewrittenVae) -> Middleware:
    def norm(call_next: Callable[..., Any], module: Any, x: Any) -> torch.Tensor:
        return channel_norm(x, module.gamma, module.scale, activate=False) if rewritten.acts else call_next(x)

    return norm


def _activated_norm(rewritten: RewrittenVae, activation: nn.Module) -> Middleware:
    after = weakref.ref(activation)

    def norm(call_next: Callable[..., Any], module: Any, x: Any) -> torch.Tensor:
        if not rewritten.acts:
            return call_next(x)
        # A hook of the user's between the two sees, and may replace, what is not activated yet.
        if module._forward_hooks or getattr(after(), "_forward_pre_hooks", None):
            return channel_norm(x, module.gamma, module.scale, activate=False)
        activated = channel_norm(x, module.gamma, module.scale, activate=True)
        setattr(activated, _ACTIVATED, True)
        return activated

    return norm


def _pass_activated(call_next: Callable[..., Any], activation: nn.Module, input: Any) -> torch.Tensor:
    return input if vars(input).pop(_ACTIVATED, False) else call_next(input)
