"""How far rounding alone moves a result on this machine: stock against stock, its sums added up in another order.

A bound on rounding is a floor measured here, in the same test, and never a figure that some machine has shown:

    assert is_rounding(difference(ours, stock), floor_of(lambda: entry.call(pipe), pipe.transformer))
"""

import contextlib
import functools
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
T = TypeVar("T")

MARGIN = 4.0
"""Stock in two orders is no further from itself than ours from stock, if both only round: the largest of some thousand
differences varies by half from one order to the next, and attention and norms, which keep theirs here, add a part."""
EPS = torch.finfo(torch.float32).eps


def once(function: Callable[P, T]) -> Callable[P, T]:
    """Keep what `function` returns for each set of arguments, which need not be hashable but can be pickled."""
    found: dict[bytes, T] = {}

    @functools.wraps(function)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        key = pickle.dumps((args, sorted(kwargs.items())))
        if key not in found:
            found[key] = function(*args, **kwargs)
        return found[key]

    return kept


def is_rounding(difference: float, floor: float | Callable[[], float], *, margin: float = MARGIN) -> bool:
    """Whether a difference is within a margin of the floor, which is measured only where there is a difference."""
    return difference == 0.0 or difference <= margin * (floor if isinstance(floor, float) else floor())


@torch.no_grad()
def floor_of(run: Callable[[], Any], *models: nn.Module, orders: int = 2, stock: Any = None) -> float:
    """Return the largest difference between what `run` returns as it is and in other orders of the sums of `models`.

    As it is, it returns `stock`, where that is known.
    """
    stock, floor = _tensors(run() if stock is None else stock), 0.0
    for seed in range(orders):
        with reordered(*models, seed=seed):
            floor = max([floor, *(float((a - b).abs().max()) for a, b in zip(_tensors(run()), stock, strict=True))])
    size = max(float(tensor.abs().max()) for tensor in stock)
    assert 0.0 < floor < 0.1 * size, f"{floor} is not rounding of values that reach {size}"
    return floor


@contextlib.contextmanager
def reordered(*models: nn.Module, seed: int = 0) -> Iterator[None]:
    """Inside, linear layers and convolutions take their input channels, with the weights for them, in another order."""
    generator, hooks, weights = torch.Generator().manual_seed(seed), [], []
    for module in {module: None for model in models for module in model.modules()}:
        # The weights of an `nn.MultiheadAttention` are read without a call of the layer that has them.
        linear = isinstance(module, nn.Linear) and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        if not linear and not (isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.groups == 1):
            continue
        order = torch.randperm(module.weight.shape[1], generator=generator)

        def permute(_: nn.Module, args: tuple, order: torch.Tensor = order, dim: int = -1 if linear else 1) -> tuple:
            return tuple(arg.index_select(dim, order) if isinstance(arg, torch.Tensor) else arg for arg in args)

        weights.append((module, module.weight))
        module.weight = nn.Parameter(module.weight.detach()[:, order].contiguous(), requires_grad=False)
        hooks.append(module.register_forward_pre_hook(permute))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight in weights:
            module.weight = weight


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf.double() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def python_calls(run: Callable[[], Any]) -> int:
    """Count the calls of Python and C functions that `run` makes once warm: what it costs, the same on any machine."""
    run()
    count = 0

    def note(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count
