"""Token sharding: layers outside the blocks give each rank its own tokens, and put the result together again.

All stand outside compiled code. Only attention looks beyond a rank's own tokens: see `attend`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeboost.contract.call import Call, current_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.core.sharding import TokenArgument, TokenSharding
from pipeboost.distributed import SEQUENCE
from pipeboost.features.parallel.shards import SHARDS, Shards, sizes


def shard_sequence(model: torch.nn.Module, family: Family, ledger: Ledger) -> None:
    """Let the ranks of a call's sequence group share the tokens of a transformer.

    Args:
        model: pipelines that share it share the layers, which act in calls with such a group only.
        family: has a `token_sharding`.
        ledger: takes the inverse.
    """
    sharding = family.token_sharding
    assert sharding is not None
    name = stock_class(model).__name__

    def apply(inner: Ledger) -> None:
        inner.add_middleware(model, "__call__", functools.partial(_forward, sharding), place="component.sequence")
        first = True
        for blocks in family.blocks:
            for block in operator.attrgetter(blocks.path)(model):
                layer = functools.partial(_block, sharding, sharding.streams if first else (), name)
                inner.add_middleware(block, "__call__", layer, place="block.sequence")
                first = False
        for path, outputs in sharding.outputs.items():
            inner.add_middleware(
                operator.attrgetter(path)(model),
                "__call__",
                functools.partial(_output, outputs),
                place="submodule.sequence",
            )
        inner.add_middleware(
            operator.attrgetter(sharding.gathered)(model), "__call__", _gather, place="submodule.sequence"
        )

    ledger.share(model, "token sharding", family.name, apply)


def _forward(
    sharding: TokenSharding, call_next: Callable[..., Any], owner: torch.nn.Module, *args: Any, **kwargs: Any
) -> Any:
    call = current_call()
    if call is None or call.mesh is None or call.mesh.group(*SEQUENCE).size == 1:
        return call_next(*args, **kwargs)
    group = call.mesh.group(*SEQUENCE)
    shards = Shards(group.size, group.rank)
    args, kwargs = _with_own_tokens(shards, sharding.forward, owner, args, kwargs)
    call[SHARDS] = shards
    try:
        return call_next(*args, **kwargs)
    finally:
        call.pop(SHARDS)


def _block(
    sharding: TokenSharding,
    streams: Sequence[TokenArgument],
    model: str,
    call_next: Callable[..., Any],
    owner: torch.nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Any:
    call = current_call()
    shards = _shards_of(call)
    if shards is None:
        return call_next(*args, **kwargs)
    given = _named(owner, args, kwargs)
    # A cache runs the first block with what it got from it, a captured graph all of them once more.
    if streams and not shards.has(given[streams[0].name]):
        for stream in streams:
            setattr(shards, stream.tokens, given[stream.name].shape[stream.dim])
        _refuse_too_few(shards, sharding, model)
        args, kwargs = _with_own_tokens(shards, streams, owner, args, kwargs)
    _refuse_adapter_tokens(shards, given)
    args, kwargs = _with_own_tokens(shards, sharding.constants, owner, args, kwargs)
    for name in sharding.leading:
        args, kwargs = _changed(owner, args, kwargs, name, shards.leading)
    return call_next(*args, **kwargs)


def _output(
    outputs: Sequence[TokenArgument], call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any
) -> Any:
    result = call_next(*args, **kwargs)
    shards = _shards_of(current_call())
    if shards is None:
        return result
    changed = list(result)
    for output in outputs:
        changed[int(output.name)] = shards.own(changed[int(output.name)], output)
    return tuple(changed)


def _gather(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    result = call_next(*args, **kwargs)
    call = current_call()
    shards = _shards_of(call)
    if shards is None:
        return result
    assert call is not None
    assert call.mesh is not None
    return call.mesh.group(*SEQUENCE).all_gather(result, 1, sizes(shards.image, shards.ranks))


def _shards_of(call: Call | None) -> Shards | None:
    return None if call is None else call.get(SHARDS)


def _refuse_too_few(shards: Shards, sharding: TokenSharding, model: str) -> None:
    text = shards.text if sharding.text_on_every_rank else shards.ranks
    if shards.image < shards.ranks or text < shards.ranks:
        raise UnsupportedError(
            f"{shards.ranks} ranks cannot share {shards.image} image and {shards.text} text tokens of {model}; use at "
            f"most ulysses * ring = {min(shards.image, text)}"
        )


def _refuse_adapter_tokens(shards: Shards, given: Mapping[str, Any]) -> None:
    """Attention to an adapter's tokens is told from attention among a rank's own by their number alone."""
    adapter = (given.get("joint_attention_kwargs") or {}).get("ip_hidden_states") or ()
    own = sizes(shards.image, shards.ranks)
    for states in adapter if isinstance(adapter, (list, tuple)) else (adapter,):
        tokens = states.shape[1] if states.ndim == 3 else states.shape[1] * states.shape[2]
        if tokens in own:
            raise UnsupportedError(
                f"an IP-Adapter with {tokens} tokens cannot be used where a rank has as many image tokens "
                f"({shards.image} on {shards.ranks} ranks); use another size or another ulysses * ring"
            )


def _with_own_tokens(
    shards: Shards,
    arguments: Sequence[TokenArgument],
    owner: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for argument in arguments:
        name, _, item = argument.name.partition(".")

        def own(value: Any, argument: TokenArgument = argument, item: str = item) -> Any:
            if not item:
                return shards.own(value, argument)
            parts = list(value)
            parts[int(item)] = shards.own(parts[int(item)], argument)
            return type(value)(parts)

        args, kwargs = _changed(owner, args, kwargs, name, own)
    return args, kwargs


def _changed(
    owner: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with one of them changed, where it is among them and not None."""
    if kwargs.get(name) is not None:
        return args, {**kwargs, name: change(kwargs[name])}
    position = _positions(stock_class(owner)).get(name, len(args))
    if position < len(args) and args[position] is not None:
        return (*args[:position], change(args[position]), *args[position + 1 :]), kwargs
    return args, kwargs


def _named(owner: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(_positions(stock_class(owner)))
    return {**dict(zip(names, args, strict=False)), **kwargs}


@functools.cache
def _positions(cls: type) -> dict[str, int]:
    return {name: position for position, name in enumerate([*signature_of(cls, "forward").parameters][1:])}
