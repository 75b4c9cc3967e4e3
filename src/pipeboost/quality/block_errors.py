"""Where an error comes from: each block of a transformer, accelerated, on the inputs that stock gave it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipeboost.core.blocks import repeated_blocks
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.quality.metrics import outputs_on_host, relative_error


def block_errors(
    model: nn.Module, stock: Callable[[], Any], ours: Callable[[], Any]
) -> tuple[dict[str, float], str | None]:
    """Return the relative error of each block's output to stock's on the same inputs, by its path.

    Inputs and outputs of all blocks are kept on the host meanwhile.

    Args:
        stock: runs one forward of the model stock.
        ours: runs the same forward accelerated.

    Returns:
        The errors, and why there are none of some or all blocks.
    """
    blocks = repeated_blocks(model)
    kept: dict[str, tuple[list[Any], dict[str, torch.Tensor]]] = {}
    errors: dict[str, float] = {}

    def keep(path: str, call_next: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves = _leaves(block, args, kwargs)[0]
        inputs = [leaf.detach().cpu().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        output = call_next(*args, **kwargs)
        kept.setdefault(path, (inputs, outputs_on_host(output)))
        return output

    def compare(path: str, call_next: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves, spec, bound = _leaves(block, args, kwargs)
        inputs, expected = kept.get(path, ([], {}))
        if path in errors or list(map(_shape, leaves)) != list(map(_shape, inputs)):
            return call_next(*args, **kwargs)
        leaves = [
            theirs.to(own.device) if isinstance(own, torch.Tensor) else own
            for own, theirs in zip(leaves, inputs, strict=True)
        ]
        bound.arguments = pytree.tree_unflatten(leaves, spec)
        output = call_next(*bound.args, **bound.kwargs)
        found = outputs_on_host(output)
        errors[path] = max(relative_error(found[name], row) for name, row in expected.items())
        return output

    with _around(blocks, keep):
        stock()
    with _around(blocks, compare):
        ours()
    missed = len(blocks) - len(errors)
    if not missed and blocks:
        return errors, None
    name = stock_class(model).__name__
    why = "they get other inputs than in stock, such as a rank's part of the tokens, or were not called"
    return errors, f"{missed} of {len(blocks)} blocks of {name}: {why}" if blocks else f"{name} has no repeated blocks"


def _leaves(block: nn.Module, args: Any, kwargs: Any) -> tuple[list[Any], Any, inspect.BoundArguments]:
    """Return what a call of a block was given, by the names of its arguments, however they were given."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    return *pytree.tree_flatten(dict(bound.arguments)), bound


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None


@contextlib.contextmanager
def _around(blocks: dict[str, nn.Module], middleware: Callable[..., Any]) -> Iterator[None]:
    ledger = Ledger()
    try:
        for path, block in blocks.items():
            ledger.add_middleware(block, "__call__", functools.partial(middleware, path), place="block.verify")
        yield
    finally:
        ledger.undo()
