"""What a CUDA graph has frozen of a model: where its weights lie, and everything that its Python code reads.

A graph reads weights where they lay when it was captured: numbers written there later are seen, other memory is not.
Scales of adapters, the adapters that are active, processors and flags were read once. So each module is compared with
what it was: its class, its submodules, its hooks, the memory of its tensors and all its own attributes. This takes
about a microsecond a module.
"""

from __future__ import annotations

import contextlib
import enum
import operator
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pipeboost.core.obstacles import hook_of, odd_weights_of

_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, type, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_COMPILED_BY_HAND = ("_orig_mod", "_compiled_call_impl")
_OTHERWISE_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
_DEEPEST = 5


class Frozen:
    """A model as it is now. Holds neither its modules nor their tensors.

    Attributes:
        unfit: what keeps its forward from being captured, in words; None where nothing does.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        named = list(model.named_modules())
        modules = [module for _, module in named]
        self._names = [name for name, _ in named]
        self._modules = [weakref.ref(module) for module in modules]
        settings = [_settings(vars(module)) for module in modules]
        self._pick = [operator.itemgetter(*plain) for plain, _ in settings]
        self._opened = [(index, key) for index, (_, opened) in enumerate(settings) for key in opened]
        self._state = self._look(list(modules))
        self._state["settings"] = _plain_copy(self._state["settings"])
        self._caches = [(cache, cache.cache_info()) for cache in _cached_functions(set(map(type, modules)))]
        self.unfit = next((reason for name, module in named if (reason := _unfit(name, module, device))), None)

    def change(self) -> str | None:
        """Where the model is not what it was, in words; None where a graph of it is still right."""
        modules = [reference() for reference in self._modules]
        try:
            now = self._look(modules)
            different = next((kind for kind, found in now.items() if found != self._state[kind]), None)
            if different is not None:
                return f"the {different} of {self._first(different, now)}"
        except Exception as error:  # a module is gone, an attribute is missing, or a new one refuses to be compared
            return f"its attributes ({type(error).__name__})"
        for cache, before in self._caches:
            # A tensor that a function keeps is read by the graph where it lies, and gone once the function drops it.
            info = cache.cache_info()
            fresh = info.misses - before.misses
            if fresh < 0 or (info.maxsize is not None and fresh > info.maxsize - before.currsize):
                return f"what {cache.__qualname__} kept may be gone"
        return None

    def _first(self, kind: str, now: dict[str, list[Any]]) -> str:
        """The module where two looks differ first, where the lists tell."""
        pairs = enumerate(zip(now[kind], self._state[kind], strict=False))
        index = next((index for index, (one, other) in pairs if one != other), 0)
        if kind == "objects":
            where, key = self._opened[index]
            return f"{self._names[where] or 'the model'} ({key})"
        return "the model" if kind in ("weights", "submodules") else self._names[index] or "the model"

    def _look(self, modules: Sequence[Any]) -> dict[str, list[Any]]:
        """What is compared, one list for all modules each: a list takes a fraction of the time of a loop."""
        members = [module.__dict__ for module in modules]
        return {
            "class": list(map(type, modules)),
            "attributes": list(map(len, members)),
            # While all modules that there were are alive, no other one has the identity of one of them.
            "submodules": [id(child) for each in members for child in each["_modules"].values()],
            "hooks": [bool(each["_forward_hooks"] or each["_forward_pre_hooks"]) for each in members],
            "weights": [
                _memory(tensor)
                for each in members
                for tensor in (*each["_parameters"].values(), *each["_buffers"].values())
                if tensor is not None
            ],
            "settings": [pick(each) for pick, each in zip(self._pick, members, strict=True)],
            "objects": [_content(members[index][key]) for index, key in self._opened],
        }


def _settings(members: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of a module's own attributes: those that can be compared, and those that must be looked into."""
    plain, opened = ["training", "training"], []  # two at least, so that a tuple is picked
    for key in members:
        if key in _EVERY_MODULE or key.startswith("_pipeboost"):
            continue
        try:
            _plain_copy(members[key])
            plain.append(key)
        except _Opaque:
            opened.append(key)
    return plain, opened


def _hooked(members: dict[str, Any]) -> bool:
    return bool(members["_forward_hooks"] or members["_forward_pre_hooks"])


class _Opaque(Exception):  # noqa: N818 - not an error
    """A value that a comparison of equals cannot judge."""


def _plain_copy(value: Any) -> Any:
    """A value that equals this one as long as it is what it is, even where it is changed in place."""
    if isinstance(value, (*_ATOMS, enum.Enum)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain_copy(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (set, frozenset)):
        return {_plain_copy(item) for item in value}
    if isinstance(value, dict):
        return {_plain_copy(key): _plain_copy(item) for key, item in value.items()}
    raise _Opaque


def _memory(tensor: torch.Tensor) -> Any:
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _content(value: Any, depth: int = 0) -> Any:
    if isinstance(value, (*_ATOMS, enum.Enum)):
        return value
    if isinstance(value, torch.Tensor):
        return _memory(value)
    if depth < _DEEPEST and isinstance(value, (list, tuple, set, frozenset)):
        return [_content(item, depth + 1) for item in value]
    if depth < _DEEPEST and isinstance(value, dict):
        return [(_content(key, depth + 1), _content(item, depth + 1)) for key, item in value.items()]
    who = _who(value)
    # Modules are looked at by themselves; functions and classes are what they are.
    if depth >= _DEEPEST or isinstance(value, (nn.Module, type, types.FunctionType)) or not hasattr(value, "__dict__"):
        return who
    return (who, type(value), id(type(value)), _content(vars(value), depth + 1))


def _who(value: Any) -> Any:
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _unfit(name: str, module: nn.Module, device: torch.device) -> str | None:
    where = name or "the model"
    members = vars(module)
    if module.training and (not name or isinstance(module, _OTHERWISE_IN_TRAINING)):
        return f"{where} is in training mode"
    obstacle = hook_of(members) or odd_weights_of(module)
    if obstacle is not None:
        return f"{where} has {obstacle}"
    if _hooked(members):
        return f"{where} has a hook, which a graph would not run"
    if any(members.get(mark) is not None or mark in members["_modules"] for mark in _COMPILED_BY_HAND):
        return f"{where} was compiled by hand"
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.device != device:
            return f"the weights of {where} are on {tensor.device}"
    return None


def _cached_functions(classes: set[type]) -> list[Any]:
    """The functions with a cache among the methods of classes, such as those that make positions once for a size."""
    members = [member for cls in classes for base in cls.__mro__ for member in vars(base).values()]
    inner = [cell.cell_contents for member in members for cell in _cells(member)]
    return list({id(each): each for each in (*members, *inner) if hasattr(each, "cache_info")}.values())


def _cells(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        # One that is not filled yet says so only when it is read.
        with contextlib.suppress(ValueError):
            if cell.cell_contents is not None:
                yield cell
