"""CFG-parallel where a step's guidance branches are one batch: each rank computes some samples and receives the others.

Samples of a batch know nothing of each other, so any batch that divides by the ranks is shared, be it of two branches
or of two prompts without guidance; one that does not is computed whole by every rank. A smaller batch may take other
kernels and less padding, so rounding changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch.utils._pytree import tree_leaves

from pipeboost.contract.call import current_call
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.core.sharding import BatchedBranches
from pipeboost.distributed import Group


def share_batch(model: torch.nn.Module, family: Family, ledger: Ledger) -> None:
    """Let the ranks of a call's `"cfg"` group compute a part of each batch.

    Args:
        model: a denoiser; pipelines that share it share the middleware, which acts in calls with such a group only.
        family: knows which arguments have an entry for each sample.
        ledger: takes the inverse.
    """
    assert family.batched is not None
    forward = functools.partial(_forward, family.batched)
    ledger.share_middleware(
        model, "__call__", forward, place="component.cfg", kind="guidance branches", settings=family.batched
    )


def _forward(
    batched: BatchedBranches, call_next: Callable[..., Any], owner: torch.nn.Module, *args: Any, **kwargs: Any
) -> Any:
    call = current_call()
    if call is None or call.mesh is None or call.mesh.degree("cfg") == 1:
        return call_next(*args, **kwargs)
    group = call.mesh.group("cfg")
    bound = signature_of(stock_class(owner), "forward").bind(owner, *args, **kwargs)
    batch = _batch(batched, bound.arguments)
    if batch is None or batch % group.size:
        return call_next(*args, **kwargs)
    share = batch // group.size
    own = slice(group.rank * share, (group.rank + 1) * share)
    for name in batched.samples:
        if bound.arguments.get(name) is not None:
            bound.arguments[name] = bound.arguments[name][own]
    return _gathered(call_next(*bound.args[1:], **bound.kwargs), group, share)


def _batch(batched: BatchedBranches, arguments: Mapping[str, Any]) -> int | None:
    """Return how many samples a forward gets; None where that is not certain, or other arguments may belong to some."""
    first = arguments.get(batched.samples[0])
    listed = first if isinstance(first, list) else [None]
    shapes = {each.shape if isinstance(each, torch.Tensor) else None for each in listed}
    if not isinstance(first, torch.Tensor) and (len(shapes) != 1 or None in shapes):
        return None
    sizes = set()
    for name, value in arguments.items():
        if name in batched.samples and value is not None:
            several = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)
            sizes.add(len(value) if several else None)
        elif name != "self" and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            return None
    return sizes.pop() if len(sizes) == 1 else None


def _gathered(value: Any, group: Group, share: int) -> Any:
    """Return what a forward of all samples would have returned, from what those of the ranks returned."""
    if isinstance(value, torch.Tensor):
        return group.all_gather(value, 0, [share] * group.size)
    if isinstance(value, list):
        return list(_gathered(torch.stack(value), group, share).unbind())
    if isinstance(value, BaseOutput):
        return type(value)(**{name: _gathered(part, group, share) for name, part in value.items()})
    assert isinstance(value, tuple), f"a forward returned {type(value).__name__}"
    return tuple(_gathered(part, group, share) for part in value)
