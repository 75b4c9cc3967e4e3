"""Token sharding: middleware outside the blocks gives each rank its own tokens, and puts the result together again.

Image and text are each cut into runs of equal length, give or take one. All of it is outside compiled code. Only
attention looks beyond a rank's own tokens: see `ulysses_ring.py`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.core.sharding import TokenArgument, TokenSharding
from pipeboost.distributed import SEQUENCE


def sizes(tokens: int, ranks: int) -> list[int]:
    """Return how many of `tokens` each rank has; the first ones have one more where they cannot be equal."""
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


@dataclass
class Shards:
    """How one forward's tokens are shared.

    Attributes:
        ranks: how many share them.
        rank: this one.
        image: tokens of the image, of all ranks.
        text: tokens of the text, of all ranks.
    """

    ranks: int
    rank: int
    image: int = 0
    text: int = 0
    _own: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def joint_sizes(self) -> list[int]:
        """How many tokens of image and text each rank has."""
        image, text = sizes(self.image, self.ranks), sizes(self.text, self.ranks)
        return [sum(own) for own in zip(image, text, strict=True)]

    def own(self, value: Any, argument: TokenArgument) -> Any:
        """Return this rank's tokens of a tensor, or of each in a tuple or list.

        Asked again for the same tensor it gives the same answer, and its own answers are taken for what they are.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self.own(item, argument) for item in value)
        if not isinstance(value, torch.Tensor) or (argument.ndim is not None and value.ndim != argument.ndim):
            return value
        known = self._own.get(id(value))
        if known is None:
            own = self._cut(value, argument)
            known = self._own[id(value)] = (value, own)
            self._own[id(own)] = (own, own)
        return known[1]

    def has(self, value: Any) -> bool:
        """Whether a tensor is one of this rank's own already."""
        known = self._own.get(id(value))
        return known is not None and known[1] is value

    def leading(self, tokens: int) -> int:
        """Return how many of the first `tokens` of the image are this rank's."""
        share = sizes(self.image, self.ranks)
        start = sum(share[: self.rank])
        return min(max(tokens - start, 0), share[self.rank])

    def _cut(self, value: torch.Tensor, argument: TokenArgument) -> torch.Tensor:
        if argument.tokens in ("image", "text"):
            return self._run(value, argument.dim)
        lengths = {"image": self.image, "text": self.text}
        order = argument.tokens.split("_")
        parts = value.split([lengths[name] for name in order], dim=argument.dim)
        return torch.cat([self._run(part, argument.dim) for part in parts], dim=argument.dim)

    def _run(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        share = sizes(value.shape[dim], self.ranks)
        return value.narrow(dim, sum(share[: self.rank]), share[self.rank]).contiguous()


SHARDS = Slot[Shards]()
"""Those of the forward that runs."""


def shard_sequence(model: torch.nn.Module, family: Family, ledger: Ledger) -> None:
    """Let the ranks of a call's sequence group share the tokens of a transformer.

    Args:
        model: pipelines that share it share the middleware, which acts in calls with such a group only.
        family: has a `token_sharding`.
        ledger: takes the inverse.
    """
    sharding = family.token_sharding
    assert sharding is not None
    name = stock_class(model).__name__

    def apply(inner: Ledger) -> None:
        inner.add_middleware(model, "__call__", functools.partial(_forward, sharding), place="component.sequence")
        blocks = [block for each in family.blocks for block in operator.attrgetter(each.path)(model)]
        for number, block in enumerate(blocks):
            middleware = functools.partial(_block, sharding, () if number else sharding.streams, name)
            inner.add_middleware(block, "__call__", middleware, place="block.sequence")
        after: dict[str, Any] = {path: functools.partial(_output, each) for path, each in sharding.outputs.items()}
        for path, middleware in (*after.items(), (sharding.gathered, _gather)):
            inner.add_middleware(operator.attrgetter(path)(model), "__call__", middleware, place="submodule.sequence")

    ledger.share(model, "token sharding", family.name, apply)


def _forward(
    sharding: TokenSharding, call_next: Callable[..., Any], owner: torch.nn.Module, *args: Any, **kwargs: Any
) -> Any:
    call = current_call()
    if call is None or call.mesh is None or call.mesh.group(*SEQUENCE).size == 1:
        return call_next(*args, **kwargs)
    group = call.mesh.group(*SEQUENCE)
    shards = Shards(group.size, group.rank)
    given = _named(owner, args, kwargs)
    _take_own_tokens(shards, sharding.forward, given)
    call[SHARDS] = shards
    try:
        return call_next(*_positional(owner, args, given), **given)
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
    shards = _shards_of(current_call())
    if shards is None:
        return call_next(*args, **kwargs)
    given = _named(owner, args, kwargs)
    # A cache runs the first block with what it got from it, a captured graph all of them once more.
    if streams and not shards.has(given[streams[0].name]):
        for stream in streams:
            setattr(shards, stream.tokens, given[stream.name].shape[stream.dim])
        _refuse_too_few(shards, sharding, model)
        _take_own_tokens(shards, streams, given)
    _refuse_adapter_tokens(shards, given)
    _take_own_tokens(shards, sharding.constants, given)
    for name in sharding.leading:
        if given.get(name) is not None:
            given[name] = shards.leading(given[name])
    return call_next(*_positional(owner, args, given), **given)


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
    result, call = call_next(*args, **kwargs), current_call()
    shards = _shards_of(call)
    if call is None or call.mesh is None or shards is None:
        return result
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
    """Refuse an adapter with as many tokens as a rank has: attention to them looks like that among the rank's own."""
    adapter = (given.get("joint_attention_kwargs") or {}).get("ip_hidden_states") or ()
    own = sizes(shards.image, shards.ranks)
    for states in adapter if isinstance(adapter, (list, tuple)) else (adapter,):
        tokens = states.shape[1] if states.ndim == 3 else states.shape[1] * states.shape[2]
        if tokens in own:
            raise UnsupportedError(
                f"an IP-Adapter with {tokens} tokens cannot be used where a rank has as many image tokens "
                f"({shards.image} on {shards.ranks} ranks); use another size or another ulysses * ring"
            )


def _take_own_tokens(shards: Shards, arguments: Sequence[TokenArgument], given: dict[str, Any]) -> None:
    for argument in arguments:
        name, _, item = argument.name.partition(".")
        value = given.get(name)
        if value is not None and item:
            parts = list(value)
            parts[int(item)] = shards.own(parts[int(item)], argument)
            given[name] = type(value)(parts)
        elif value is not None:
            given[name] = shards.own(value, argument)


def _named(owner: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward by name."""
    return {**dict(zip(_names(stock_class(owner)), args, strict=False)), **kwargs}


def _positional(owner: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> list[Any]:
    """Take out of `given` what was given by position, as what lies further inside expects it."""
    return [given.pop(name) for name in _names(stock_class(owner))[: len(args)]]


@functools.cache
def _names(cls: type) -> list[str]:
    return [*signature_of(cls, "forward").parameters][1:]
