"""What a layer computes that has one rank's share of its weights.

A column's share needs no code. For the others a module's class becomes a disguised subclass with a `forward` of its
own, one for each stock class and group, because torch.compile guards on the class.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeboost.core.errors import UnsupportedError
from pipeboost.core.seams import disguised_subclass, stock_class
from pipeboost.distributed import Group
from pipeboost.features.parallel.tensor_layout import Role

_classes: weakref.WeakValueDictionary[tuple[type, Role, str], type] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def become_share(layer: nn.Module, role: Role, group: Group) -> None:
    """Give a layer that has its share of the weights the `forward` that goes with it."""
    make = _FORWARDS.get(role)
    if make is None:
        return
    stock = type(layer)
    with _lock:
        subclass = _classes.get((stock, role, group.name))
        if subclass is None:
            # A copy would have the share without the code that knows it is one.
            no_copy = dict.fromkeys(("__deepcopy__", "__reduce_ex__"), _refuse_copy)
            subclass = disguised_subclass(
                stock, {"forward": make(stock, group), **no_copy}, shown=frozenset(["forward"])
            )
            _classes[stock, role, group.name] = subclass
    layer.__class__ = subclass


def become_whole(layer: nn.Module) -> None:
    """Take the `forward` of a share off again."""
    if type(layer) in _classes.values():
        layer.__class__ = stock_class(layer)


def _row(stock: type, group: Group) -> Callable[..., torch.Tensor]:
    def forward(self: Any, features: torch.Tensor) -> torch.Tensor:
        summed = group.all_reduce(F.linear(features, self.weight))
        return summed if self.bias is None else summed + self.bias

    return forward


def _gathered(stock: Any, group: Group) -> Callable[..., torch.Tensor]:
    def forward(self: Any, features: torch.Tensor) -> torch.Tensor:
        share = stock.forward(self, features)
        return group.all_gather(share, share.ndim - 1, [share.shape[-1]] * group.size)

    return forward


def _norm(stock: type, group: Group) -> Callable[..., torch.Tensor]:
    # Root mean square over the features of all ranks; as torch does, 16-bit inputs are normed and weighted in float32.
    def forward(self: Any, features: torch.Tensor) -> torch.Tensor:
        eps = torch.finfo(features.dtype).eps if self.eps is None else self.eps
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        squares = group.all_reduce(wide.square().sum(-1, keepdim=True))
        normed = wide * torch.rsqrt(squares / self.normalized_shape[0] + eps)
        return (normed if self.weight is None else normed * self.weight).to(features.dtype)

    return forward


_FORWARDS: dict[Role, Callable[[Any, Group], Callable[..., torch.Tensor]]] = {
    "rows": _row,
    "packed_rows": _row,
    "gathered": _gathered,
    "norms": _norm,
}


def _refuse_copy(self: Any, *_: Any) -> Any:
    raise UnsupportedError(
        "a model whose weights are split over ranks cannot be copied or pickled; call pipe.acceleration.remove() first"
    )
