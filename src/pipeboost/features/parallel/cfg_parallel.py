"""CFG-parallel: of the calls that a step makes to its denoiser, each rank computes its own and is given the others.

The script runs on every rank as it is. A call that is another rank's returns at once, with memory full of NaN; once
the ranks have computed a call each, what they computed goes to all of them, into that memory. Until then a script only
indexes or slices what it was given. One that reads it has NaN in its latents, which nobody takes for a result. Where a
step makes no further call, as without guidance, the memory is filled before `scheduler.step` reads it. A step's formula
then runs on every rank, on the same numbers as on one, and so whatever it is (guidance, rescaling, norms) comes out the
same to the bit.

Where a step's branches are one batch instead, each rank computes some samples and receives the others. Samples of a
batch know nothing of each other, so any batch that divides by the ranks is shared, be it of two branches or of two
prompts without guidance; one that does not is computed whole by every rank. A smaller batch may take other kernels and
less padding, so rounding changes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from torch.utils._pytree import tree_leaves

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import disguised_subclass, signature_of, stock_class
from pipeboost.core.sharding import BatchedBranches
from pipeboost.distributed import Group

_DEFERRED = Slot[list[torch.Tensor]](list)
"""The predictions of a step's calls so far, of which another rank's are still to be filled."""
_APART = Slot[bool](bool)
"""Whether forwards are no branches of a step."""
Prediction = Callable[[Any, torch.Tensor], torch.Tensor]


def share_branches(model: torch.nn.Module, family: Family, ledger: Ledger) -> None:
    """Let the ranks of a call's `"cfg"` group compute one guidance branch each, or a part of each batch.

    A step's calls are identified by their order. With fewer ranks than branches they take turns.

    Args:
        model: a denoiser; pipelines that share it share the middleware, which acts in calls with such a group only.
        family: knows the shape of what a forward returns, or which arguments have an entry for each sample.
        ledger: takes the inverse.
    """
    settings: Any = family.prediction if family.batched is None else family.batched
    assert settings is not None
    forward: Callable[..., Any] = _forward if family.batched is None else _forward_of_batch
    middleware = functools.partial(forward, settings)
    ledger.share_middleware(
        model, "__call__", middleware, place="component.cfg", kind="guidance branches", settings=settings
    )


def flush_deferred(reader: Any, ledger: Ledger, *, method: str = "step") -> None:
    """Fill what is still to be filled before this method of a scheduler or guider reads it."""
    ledger.share_middleware(reader, method, _flush, place="scheduler.cfg", kind="guidance branches", settings=method)


@contextlib.contextmanager
def without_cfg_parallel(call: Call) -> Iterator[None]:
    """Inside, every rank computes the forwards of a call: they are no branches of a step, and may be read at once."""
    before, call[_APART] = call[_APART], True
    try:
        yield
    finally:
        call[_APART] = before


def callback_without_cfg_parallel(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callback of the script whose own forwards are no branches of a step.

    Scripts look at the class of Diffusers' own callbacks, so one of them has a twin of its class, and of its state.
    """

    @functools.wraps(callback)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = current_call()
        with contextlib.nullcontext() if call is None else without_cfg_parallel(call):
            return callback(*args, **kwargs)

    if not isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return run
    twin: Any = object.__new__(
        disguised_subclass(type(callback), {"__call__": lambda _, *args, **kw: run(*args, **kw)})
    )
    twin.__dict__ = vars(callback)
    return twin


def _forward(
    prediction: Prediction, call_next: Callable[..., Any], owner: torch.nn.Module, *args: Any, **kwargs: Any
) -> Any:
    call = current_call()
    if call is None or call.mesh is None or call.mesh.degree("cfg") == 1 or call[_APART]:
        return call_next(*args, **kwargs)
    group = call.mesh.group("cfg")
    waiting = call[_DEFERRED]
    states, as_tuple = _states(owner, args, kwargs)
    if len(waiting) == group.rank:
        result = call_next(*args, **kwargs)
        waiting.append(_laid_out(result[0], prediction(owner, torch.empty_like(states, device="meta"))))
    else:
        empty = prediction(owner, states).fill_(float("nan"))
        result = (empty,) if as_tuple else Transformer2DModelOutput(sample=empty)
        waiting.append(empty)
    if len(waiting) == group.size:
        _fill(call)
    return result


def _flush(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is not None and call[_DEFERRED]:
        _fill(call)
    return call_next(*args, **kwargs)


def _fill(call: Call) -> None:
    """Give each rank's result to the others, in the order of the calls."""
    assert call.mesh is not None
    group = call.mesh.group("cfg")
    deferred = call.pop(_DEFERRED)
    for source, tensor in enumerate(deferred or ()):
        outermost_first = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        dense = tensor.permute(outermost_first)
        assert dense.is_contiguous(), "memory of a prediction has gaps"
        group.broadcast(dense, source)


def _laid_out(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the result, or a copy of it where the other ranks keep theirs in another order of dimensions."""
    if (result.shape, result.dtype) != (like.shape, like.dtype):
        raise UnsupportedError(
            f"cfg-parallel expects predictions like hidden_states, {tuple(like.shape)} of {like.dtype}, and the "
            f"transformer returned {tuple(result.shape)} of {result.dtype}; give it latents of the dtype that it "
            "computes in, or use ParallelConfig(cfg=1)"
        )
    strides = zip(result.stride(), like.stride(), result.shape, strict=True)
    if all(own == expected for own, expected, size in strides if size > 1):
        return result
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=result.device).copy_(result)


def _states(owner: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, bool]:
    """Return a forward's `hidden_states`, and whether it returns a tuple."""
    bound = signature_of(stock_class(owner), "forward").bind(owner, *args, **kwargs)
    bound.apply_defaults()
    states = bound.arguments["hidden_states"]
    if not isinstance(states, torch.Tensor):
        raise UnsupportedError(
            f"cfg-parallel needs hidden_states to be one tensor, and this {stock_class(owner).__name__} was given "
            f"{type(states).__name__}; use ParallelConfig(cfg=1)"
        )
    return states, not bound.arguments.get("return_dict", True)


def _forward_of_batch(
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
