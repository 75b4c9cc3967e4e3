"""`Look`: whether anything on some encoders was replaced or changed since, in a way that Python or torch shows.

An encoder has hundreds of modules with thirty attributes each. They are compared level by level in flat lists, the
attributes of all modules of one depth at once, so that no Python function runs once a module.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeboost.core.fingerprint import PLAIN, version_of

MANY = 1000
"""Containers of more items, such as vocabularies, are known by their length: tokenizers tell of what was added."""
_CONTAINERS = (dict, list, tuple, set, frozenset)
_Pick = Callable[[Sequence[Any]], Sequence[Any]]


class _Level(NamedTuple):
    """What the objects and containers of one depth hold, and how those of the next depth are found among that."""

    names: list[Any]
    ids: list[int]
    sizes: list[int]
    dicts: _Pick
    items: _Pick
    holders: _Pick
    long: _Pick
    kinds: list[Any]
    tensors: _Pick


class Look:
    """Who everything is that can be reached from `found` through containers, modules and settings.

    Nothing is kept alive but what cannot lead to weights: plain values, and what cannot be referred to weakly.

    Args:
        found: where to begin.
        placed: whether it counts where tensors lie.

    Attributes:
        shows_all_writes: whether torch counts those to all tensors, as it does to what was not made in inference mode.
    """

    def __init__(self, found: Mapping[str, Any], *, placed: bool) -> None:
        self._placed = placed
        self._levels: list[_Level] = []
        self._kept: list[Any] = []
        self._gone: list[weakref.ref[Any]] = []
        self._vocabularies: list[tuple[weakref.ref[Any], str]] = []
        tensors: list[torch.Tensor] = []
        opened: set[int] = set()
        dicts: Sequence[Any] = [found]
        items: Sequence[Any] = []
        while dicts or items:
            values = _values(dicts, items)
            level = self._add(values, dicts, items, opened)
            tensors += level.tensors(values)
            dicts, items = [*level.dicts(values), *map(vars, level.holders(values))], level.items(values)
        self._states = self._states_of(tensors)
        self.shows_all_writes = all(state[0] >= 0 for state in self._states)

    def finds_the_same(self, found: Mapping[str, Any]) -> bool:
        """Whether `found` leads to the very same objects, unchanged but for writes through `.data`."""
        dicts: list[Any] = [found]
        items: Sequence[Any] = []
        tensors: list[torch.Tensor] = []
        try:
            for level in self._levels:
                values = _values(dicts, items)
                if [*map(id, values)] != level.ids or [*itertools.chain(*dicts)] != level.names:
                    return False
                if [*map(len, dicts), *map(len, items)] != level.sizes:
                    return False
                if [*map(len, level.long(values)), *map(type, level.holders(values))] != level.kinds:
                    return False
                tensors += level.tensors(values)
                dicts, items = [*level.dicts(values), *map(vars, level.holders(values))], level.items(values)
            # Last, for who died may have left its place to another.
            added = all([vocabulary(each()) == known for each, known in self._vocabularies])
            return added and not self._gone and self._states_of(tensors) == self._states
        except (AttributeError, TypeError):  # an address is that of something else by now
            return False

    def _add(self, values: list[Any], dicts: Sequence[Any], items: Sequence[Any], opened: set[int]) -> _Level:
        indexes: dict[str, list[int]] = {"dicts": [], "items": [], "holders": [], "long": [], "tensors": []}
        names = [*itertools.chain(*dicts)]
        for index, (name, value) in enumerate(itertools.zip_longest(names, values)):
            if isinstance(name, str) and name.startswith("_pipeboost"):
                continue  # it leads to the acceleration, and so to this
            if isinstance(value, PLAIN):
                self._kept.append(value)
            elif isinstance(value, _CONTAINERS):
                kind = "long" if len(value) > MANY else "dicts" if isinstance(value, dict) else "items"
                if kind == "long" or id(value) not in opened:
                    indexes[kind].append(index)
            else:
                self._keep(value)
                if isinstance(value, torch.Tensor):
                    indexes["tensors"].append(index)
                elif is_opened(value) and id(value) not in opened:
                    indexes["holders"].append(index)
                    if hasattr(type(value), "added_tokens_decoder"):
                        self._vocabularies.append((weakref.ref(value), vocabulary(value)))
            opened.add(id(value))
        picks = {kind: _picking(found) for kind, found in indexes.items()}
        kinds = [*map(len, picks["long"](values)), *map(type, picks["holders"](values))]
        sizes = [*map(len, dicts), *map(len, items)]
        level = _Level(names, [*map(id, values)], sizes, kinds=kinds, **picks)
        self._levels.append(level)
        return level

    def _states_of(self, tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
        try:
            versions = [each._version for each in tensors]
        except RuntimeError:  # one was made in inference mode, and counts none
            versions = [version_of(each) for each in tensors]
        kinds = [(each.dtype, each.shape, each.device if self._placed else None) for each in tensors]
        return [*zip(versions, kinds, strict=True)]

    def _keep(self, value: Any) -> None:
        try:
            self._kept.append(weakref.ref(value, self._gone.append))
        except TypeError:
            self._kept.append(value)


def is_opened(value: Any) -> bool:
    """Whether an object counts by its attributes: a module, configuration, tokenizer or processor."""
    return isinstance(value, nn.Module) or hasattr(type(value), "push_to_hub")


def vocabulary(tokenizer: Any) -> str:
    """Return what was added to the vocabulary of a tokenizer, whose attributes do not have it."""
    return f"{len(tokenizer)} {tokenizer.added_tokens_decoder}"


def _values(dicts: Sequence[Any], items: Sequence[Any]) -> list[Any]:
    return [*itertools.chain(*map(dict.values, dicts), *items)]


def _picking(indexes: list[int]) -> _Pick:
    # Of one index, it would pick no tuple.
    return operator.itemgetter(*indexes, *indexes[:1]) if indexes else operator.itemgetter(slice(0))
