"""`Snapshot`: whether a model, or anything else with attributes, is what it was; about a microsecond a module.

Everything is compared as flat lists, so that no Python function runs once a module. Nothing is kept alive but plain
values, and what cannot be referred to weakly.
"""

from __future__ import annotations

import enum
import itertools
import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeboost.core.fingerprint import PLAIN, identity, version_of
from pipeboost.core.seams import stock_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_DEEPEST = 5
_GONE = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
"""What a comparison raises where a part or an attribute is gone, or an array has come where a number was."""


def versions_of(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Return the dtype, shape and version of each tensor."""
    try:
        return [(each.dtype, each.shape, each._version) for each in tensors]
    except RuntimeError:  # one was made in inference mode, and counts none
        return [(each.dtype, each.shape, version_of(each)) for each in tensors]


class Snapshot:
    """What some objects were.

    Args:
        parts: the objects by path; see `parts_of`. Of modules, submodules and tensors count too.
        names: which attributes of a part count; None where not even their number does.
        weights: what counts of tensors, besides which ones they are.
        content: what counts of an attribute that is neither plain nor one of the parts.
        hooks: whether the hooks of modules count. Those of transformers never do: they only collect hidden states, and
            come with the first call that asks for any.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        *,
        names: Callable[[Any], Iterable[str] | None],
        weights: Callable[[Sequence[torch.Tensor]], list[Any]] = versions_of,
        content: Callable[[Any], Hashable] = identity,
        hooks: bool = False,
    ) -> None:
        self._weights, self._content, self._kinds_of_hooks = weights, content, _HOOKS if hooks else ()
        self._modules = [weakref.ref(each) for each in parts.values() if isinstance(each, nn.Module)]
        counted = [(path, each, found) for path, each in parts.items() if (found := names(each)) is not None]
        self._paths = [path for path, _, _ in counted]
        self._parts = [weakref.ref(each) for _, each, _ in counted]
        self._names: list[list[str]] = [[] for _ in counted]
        self._links: list[tuple[int, str]] = []
        self._objects: list[tuple[int, str]] = []
        known = set(map(id, parts.values()))
        for index, (_, part, found) in enumerate(counted):
            for name in found:
                if is_plain(value := vars(part)[name]):
                    self._names[index].append(name)
                else:
                    (self._links if id(value) in known else self._objects).append((index, name))
        # Of one name, it would pick no tuple.
        self._pick = [operator.itemgetter(*names, *names[:1]) if names else lambda _: () for names in self._names]
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self._tensors = [weakref.ref(each) for each in self.tensors()]
        self._state = self._now()
        self._state["settings"] = _copied(self._state["settings"])

    @property
    def is_current(self) -> bool:
        """Whether all is what it was."""
        try:
            return self._now() == self._state
        except _GONE:
            return False

    def change(self) -> str | None:
        """Return what is not what it was, and where; None where all is."""
        try:
            now = self._now()
        except _GONE as error:
            return f"its attributes ({type(error).__name__})"
        kind = next((kind for kind, found in now.items() if found != self._state[kind]), None)
        if kind is None:
            return None
        differ = [one != other for one, other in zip(now[kind], self._state[kind], strict=False)]
        index, what = differ.index(True) if True in differ else 0, kind
        if kind in ("linked", "objects"):
            index, what = (self._links if kind == "linked" else self._objects)[index]
        elif kind in ("submodules", "weights", "hooks"):
            index = 0
        return f"the {what} of {self._paths[index] or 'the model'}"

    def state(self) -> Hashable:
        """Return what all was, but for tensors: equal where another snapshot found the same."""
        classes = tuple([stock_class(each()) for each in self._parts])
        plain = (self._paths, self._names, self._links, self._objects, self._state["settings"])
        return classes, repr(plain), tuple(self._state["objects"]), tuple(self._state.get("hooks", ()))

    def tensors(self) -> list[torch.Tensor]:
        """Return the parameters and buffers of the modules."""
        members = [each().__dict__ for each in self._modules]
        holders = [(*each["_parameters"].values(), *each["_buffers"].values()) for each in members]
        return [tensor for each in holders for tensor in each if tensor is not None]

    def _now(self) -> dict[str, list[Any]]:
        parts = [each() for each in self._parts]
        members = [each.__dict__ for each in parts]
        found: dict[str, list[Any]] = {
            "class": [*map(type, parts)],
            "attributes": [*map(len, members)],
            "settings": [pick(each) for pick, each in zip(self._pick, members, strict=True)],
            # While all parts that there were are alive, no other one has the identity of one of them.
            "linked": [id(members[index][name]) for index, name in self._links],
            "objects": [self._content(members[index][name]) for index, name in self._objects],
        }
        return found | self._now_of_modules() if self._modules else found

    def _now_of_modules(self) -> dict[str, list[Any]]:
        modules = [each().__dict__ for each in self._modules]
        children = [each["_modules"] for each in modules]
        hooks = [hook for each in modules for kind in self._kinds_of_hooks for hook in each[kind].values()]
        tensors, known = self.tensors(), [each() for each in self._tensors]
        same = len(tensors) == len(known) and all(map(operator.is_, tensors, known))
        return {
            "submodules": [*itertools.chain(*children), *[id(each) for found in children for each in found.values()]],
            "weights": [same, *self._weights(tensors)],
            "hooks": [identity(hook) for hook in hooks if not _is_of_transformers(hook)],
        }


def parts_of(root: Any, opens: Callable[[str, Any], bool]) -> dict[str, Any]:
    """Return what counts by its attributes, by path: a model's modules, or another object itself, and what is in them.

    Args:
        opens: whether an attribute, or what is in a container that is one, counts by its own attributes too.
    """
    found = layer = dict(root.named_modules()) if isinstance(root, nn.Module) else {"": root}
    seen = set(map(id, found.values()))
    for _ in range(_DEEPEST):
        inner = {}
        for path, part in layer.items():
            reached = [each for name in own_names(part) for each in _reached(name, vars(part)[name])]
            for name, value in reached:
                if id(value) not in seen and hasattr(value, "__dict__") and opens(name, value):
                    seen.add(id(value))
                    inner[f"{path}.{name}" if path else name] = value
        layer = inner
        found = found | inner
    return found


def own_names(part: Any) -> list[str]:
    """Return the names of an object's attributes, without what every module has and without ours."""
    return [name for name in vars(part) if name not in _OF_EVERY_MODULE and not name.startswith("_pipeboost")]


def is_plain(value: Any) -> bool:
    """Whether a value is what its `repr` says, as are containers of such values."""
    if type(value) in (list, tuple, set, frozenset):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values())) and all(map(is_plain, value))
    return isinstance(value, (*PLAIN, enum.Enum))


def _reached(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if is_plain(value) or not isinstance(value, (dict, list, tuple)):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(f"{name}.{key}", each) for key, each in items]


def _copied(value: Any) -> Any:
    """Return a plain value that stays what it is where the original changes in place."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple, set) else value


def _is_of_transformers(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("transformers.")
