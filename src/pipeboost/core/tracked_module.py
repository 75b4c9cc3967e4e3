"""`TrackedModule`: what a module computes with, kept up to date at about a microsecond a weight.

While nothing changed it compares flat lists of what it found before, and a few values of the weights: writes through
`.data`, such as peft's fuse, change neither identity nor version of a weight. Where something changed, the module is
walked anew, and only weights that are new or were written to are read.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeboost.core.fingerprint import PLAIN, hashed, kind_of, sums, version_of
from pipeboost.core.sample import Sample, can_be_sampled
from pipeboost.core.seams import stock_class

SAMPLED = 512
"""Weights of which some values are looked at in a call; of more, the next ones in the next call."""
_VALUES = 8
_OF_ADAPTERS = ("_active_adapter", "_disable_adapters")
_CONFIGURATION = "_internal_dict"
_ORDINARY = (nn.Parameter, torch.Tensor)


class Weight(NamedTuple):
    """What a weight is on every rank: its dtype, its shape, and the sum of its content."""

    dtype: str
    shape: tuple[int, ...]
    content: int

    @property
    def words(self) -> str:
        """What can be read of it."""
        return f"{self.dtype} {self.shape}"


class TrackedModule:
    """A module, held weakly, and the digest of what it computes with on any rank, wherever its weights lie.

    That is its configuration, the classes of its submodules, their plain public settings and those of their attention
    processors, active adapters, and its weights and buffers.

    Args:
        module: may be changed in any way.
        left_out: names of parameters that do not count.
    """

    def __init__(self, module: nn.Module, left_out: frozenset[str] = frozenset()) -> None:
        self._root = weakref.ref(module)
        self._left_out = left_out
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Any, int]] = {}
        self._names: dict[str, int] = {}
        self._look: _Look | None = None
        self._forgotten = False
        self._digest = b""
        self._facts: dict[str, Any] = {}

    def forget(self, *, named: str = "") -> None:
        """Take it that weights whose name has `named` in it are being written to unseen."""
        for name, key in self._names.items():
            if named in name:
                self._known.pop(key, None)
        self._forgotten = True

    @property
    def is_current(self) -> bool:
        """Whether nothing has changed since `digest` was asked, as far as can be seen at little cost."""
        if self._look is None:
            return False
        if not self._forgotten and self._look.finds_the_same() and not self._look.written():
            return True
        for key in self._look.written(all_turns=True):
            self._known.pop(key, None)
        self._look = None
        return False

    def digest(self) -> bytes:
        """Return the digest of `facts`; after `is_current` was False this reads weights."""
        if self._look is None:
            self._walk()
        return self._digest

    def facts(self) -> Mapping[str, Any]:
        """Return what it computes with by name, as `digest` found it, its own settings first and weights last."""
        return self._facts

    def _walk(self) -> None:
        root = self._root()
        assert root is not None, "the module is alive while it is asked about"
        modules = dict(root.named_modules())
        tensors = {
            f"{path}.{name}" if path else name: tensor
            for path, module in modules.items()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        counted = {name: tensor for name, tensor in tensors.items() if name not in self._left_out}
        self._facts = _settings_of(modules) | self._contents(counted)
        self._names = {name: id(tensor) for name, tensor in counted.items()}
        self._digest = hashed(repr(sorted(self._facts.items())))
        self._look, self._forgotten = _Look(modules.values(), counted.values()), False

    def _contents(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        states = {name: (version_of(each), *kind_of(each)) for name, each in tensors.items()}
        known = {}
        for name, tensor in tensors.items():
            before = self._known.get(id(tensor))
            if before is not None and before[0]() is tensor and before[1] == states[name]:
                known[id(tensor)] = before
        new = {id(tensor): (name, tensor) for name, tensor in tensors.items() if id(tensor) not in known}
        found = sums([tensor for _, tensor in new.values()])
        for (name, tensor), value in zip(new.values(), found, strict=True):
            known[id(tensor)] = (weakref.ref(tensor), states[name], value)
        self._known = known
        return {name: Weight(*kind_of(tensor), known[id(tensor)][2]) for name, tensor in tensors.items()}


def settings_of(value: Any, *, private: bool = False) -> dict[str, Any]:
    """Return the attributes of an object that are plain values or containers of some, by name.

    Args:
        private: also those whose name begins with an underscore.
    """
    return {
        name: sorted(each, key=repr) if isinstance(each, (set, frozenset)) else each
        for name, each in vars(value).items()
        if (private or name[0] != "_" or name in _OF_ADAPTERS) and name != _CONFIGURATION and _is_plain(each)
    }


def configuration_of(value: Any) -> dict[str, Any]:
    """Return the configuration of a component of Diffusers, without where it came from."""
    config = getattr(value, "config", None)
    items = config.items() if isinstance(config, Mapping) else ()
    return {name: each for name, each in items if name[0] != "_" and _is_plain(each)}


def class_of(value: Any) -> str:
    """Return the full name of an object's stock class."""
    cls = stock_class(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def _settings_of(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    root = modules[""]
    found: dict[str, Any] = {"class": class_of(root), **configuration_of(root)}
    found["adapters"] = ", ".join(getattr(root, "peft_config", None) or ()) or "none"
    found["dtype"] = sorted(
        {str(each.dtype) for module in modules.values() for each in module._parameters.values() if each is not None}
    )
    for path, module in modules.items():
        start = f"{path}." if path else ""
        if path:
            found[path] = class_of(module)
        own = {} if _is_of_torch(module) else settings_of(module)
        found |= {f"attribute {name}" if start + name in found else start + name: own[name] for name in own}
        processor = vars(module).get("processor")
        if processor is not None and not _is_plain(processor):
            found[f"{start}processor"] = _of_processor(processor)
    # What is empty may be filled by a call.
    return {name: each for name, each in found.items() if each not in ([], {}, ())}


class _Look:
    """Flat lists of what a module consisted of; holds neither its submodules nor its tensors."""

    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor]) -> None:
        modules = list(modules)
        self._parents = [weakref.ref(each) for each in modules if each._modules]
        self._owners = [weakref.ref(each) for each in modules if each._parameters]
        self._buffered = [weakref.ref(each) for each in modules if each._buffers]
        told = [(each, settings_of(each)) for each in modules if not _is_of_torch(each)]
        self._set = [weakref.ref(each) for each, _ in told]
        self._pick = [_picking(settings) for _, settings in told]
        self._attending = [weakref.ref(each) for each, _ in told if hasattr(vars(each).get("processor"), "__dict__")]
        self._pick_processor = [_picking(settings_of(each, private=True)) for each in self._processors()]
        self._children = [weakref.ref(each) for each in _children(modules)]
        self._tensors = [weakref.ref(each) for each in _tensors(modules, modules)]
        self._state = self._now()
        self._state[-2:] = copy.deepcopy(self._state[-2:])  # which may change in place
        sampled = [each for each in tensors if type(each) in _ORDINARY and can_be_sampled(each)]
        count = -(-len(sampled) // SAMPLED) or 1
        self._turns = [_Turn(sampled[number::count]) for number in range(count)]
        self._next = 0

    def finds_the_same(self) -> bool:
        """Whether the module consists of the same, with the same settings and versions."""
        try:
            now = self._now()
            return bool(now) and now == self._state
        except (AttributeError, KeyError, RuntimeError, ValueError):
            return False  # a module or an attribute is gone, or an array has come where a number was

    def written(self, *, all_turns: bool = False) -> list[int]:
        """Ids of weights of which some values are not what they were: of those whose turn it is, or of all."""
        turns = self._turns if all_turns else [self._turns[self._next]]
        self._next = (self._next + 1) % len(self._turns)
        return [key for turn in turns for key in turn.written()]

    def _now(self) -> list[list[Any]]:
        tensors = _tensors([each() for each in self._owners], [each() for each in self._buffered])
        if not _are(self._tensors, tensors) or not _are(self._children, _children([each() for each in self._parents])):
            return []
        members, processors = [each().__dict__ for each in self._set], self._processors()
        return [
            [each.dtype for each in tensors],
            _versions(tensors),
            list(map(len, members)),
            list(map(type, processors)),
            [pick(each) for pick, each in zip(self._pick, members, strict=True)],
            [pick(each.__dict__) for pick, each in zip(self._pick_processor, processors, strict=True)],
        ]

    def _processors(self) -> list[Any]:
        return [each().__dict__["processor"] for each in self._attending]


class _Turn:
    """Tensors of which some values are looked at in one call."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._ids = list(map(id, tensors))
        self._sample = Sample(tensors, _spread)
        self._found = self._sample.sums()

    def written(self) -> list[int]:
        """Ids of those whose values are not what they were; those that are gone are none of them."""
        try:
            now = self._sample.sums()
        except RuntimeError:  # the memory of one has another form
            return self._ids
        if now == self._found:
            return []
        return [key for key, one, other in zip(self._ids, now, self._found, strict=True) if one not in (None, other)]


def _spread(shape: torch.Size) -> tuple[int, int]:
    """A few of the elements, the first among them; the stride is odd, to meet many columns of a matrix."""
    elements = shape.numel()
    stride = (elements - 1) // (_VALUES - 1)
    return min(elements, _VALUES), max(stride - (stride % 2 == 0), 1)


def _is_of_torch(module: nn.Module) -> bool:
    """Whether it is of torch's own class, of whose settings nobody changes one."""
    return type(module).__module__.startswith("torch.nn.")


def _picking(settings: Iterable[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    names = list(settings)
    # Of one name, it would pick no tuple.
    return operator.itemgetter(*names, *names[:1]) if names else lambda _: ()


def _are(references: Sequence[weakref.ref[Any]], objects: Sequence[Any]) -> bool:
    return len(references) == len(objects) and all(map(operator.is_, [each() for each in references], objects))


def _children(modules: Iterable[Any]) -> list[nn.Module]:
    return [child for each in modules for child in each.__dict__["_modules"].values() if child is not None]


def _tensors(owners: Iterable[Any], buffered: Iterable[Any]) -> list[torch.Tensor]:
    found = [each for owner in owners for each in owner.__dict__["_parameters"].values() if each is not None]
    return found + [each for owner in buffered for each in owner.__dict__["_buffers"].values() if each is not None]


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return [each._version for each in tensors]
    except RuntimeError:  # one was made in inference mode, and counts none
        return [version_of(each) for each in tensors]


def _of_processor(processor: Any) -> Any:
    if isinstance(processor, nn.Module) or not hasattr(processor, "__dict__"):
        return class_of(processor)
    return (class_of(processor), settings_of(processor, private=True))


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values())) and all(map(_is_plain, value))
    return isinstance(value, PLAIN)
