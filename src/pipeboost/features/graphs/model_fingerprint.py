"""What a CUDA graph has frozen of a model: where its weights lie, and everything that its Python code reads.

A graph reads weights where they lay when it was captured: numbers written there later are seen, other memory is not.
Scales of adapters, the adapters that are active, processors and flags were read once. So each module is compared with
what it was: its class, its submodules, its hooks, the memory of its tensors and all its own attributes. This takes
about a microsecond a module.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pipeboost.core.fingerprint import Identity, structure
from pipeboost.core.obstacles import hook_of, odd_weights_of
from pipeboost.core.snapshot import Snapshot, own_names, parts_of

_COMPILED_BY_HAND = ("_orig_mod", "_compiled_call_impl")
_OTHERWISE_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


class ModelFingerprint:
    """A model as it is now. Holds neither its modules nor their tensors.

    Attributes:
        unfit: what keeps its forward from being captured, in words; None where nothing does.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        parts = parts_of(model, _has_settings)
        modules = {path: each for path, each in parts.items() if isinstance(each, nn.Module)}
        self._snapshot = Snapshot(parts, names=own_names, weights=_memory, content=_content, hooks=True)
        self._caches = [(cache, cache.cache_info()) for cache in _cached_functions(set(map(type, modules.values())))]
        self.unfit = next((reason for path, each in modules.items() if (reason := _unfit(path, each, device))), None)

    def change(self) -> str | None:
        """Where the model is not what it was, in words; None where a graph of it is still right."""
        if (change := self._snapshot.change()) is not None:
            return change
        for cache, before in self._caches:
            # A tensor that a function keeps is read by the graph where it lies, and gone once the function drops it.
            info = cache.cache_info()
            fresh = info.misses - before.misses
            if fresh < 0 or (info.maxsize is not None and fresh > info.maxsize - before.currsize):
                return f"what {cache.__qualname__} kept may be gone"
        return None


def _has_settings(_: str, value: Any) -> bool:
    return not isinstance(value, (nn.Module, type, types.FunctionType, dict, torch.Tensor))


def _memory(tensors: Sequence[torch.Tensor]) -> list[Any]:
    return [(each.data_ptr(), each.dtype, each.shape, each.stride()) for each in tensors]


def _content(value: Any) -> Hashable:
    return structure(value, tensor=lambda tensor: _memory([tensor])[0], other=lambda each, _: Identity(each))


def _unfit(name: str, module: nn.Module, device: torch.device) -> str | None:
    where = name or "the model"
    members = vars(module)
    if module.training and (not name or isinstance(module, _OTHERWISE_IN_TRAINING)):
        return f"{where} is in training mode"
    obstacle = hook_of(members) or odd_weights_of(module)
    if obstacle is not None:
        return f"{where} has {obstacle}"
    if members["_forward_hooks"] or members["_forward_pre_hooks"]:
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
