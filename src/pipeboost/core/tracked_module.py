"""`TrackedModule`: what a module computes with, kept up to date at about a microsecond a weight.

While nothing changed it compares flat lists of what it found before, and a few values of the weights: writes through
`.data`, such as peft's fuse, change neither identity nor version of a weight. Where something changed, the module is
walked anew, and only weights that are new or were written to are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeboost.core.fingerprint import class_of, hashed, kind_of, sums, version_of
from pipeboost.core.sample import Sample, can_be_sampled
from pipeboost.core.snapshot import Snapshot, is_plain, parts_of

SAMPLED = 512
"""Weights of which some values are looked at in a call; of more, the next ones in the next call."""
_VALUES = 8
_OF_ADAPTERS = ("_active_adapter", "_disable_adapters")
_CONFIGURATION = "_internal_dict"


class Weight(NamedTuple):
    """What a weight is on every rank: its dtype, its shape, and the sum of its content."""

    dtype: str
    shape: tuple[int, ...]
    content: int

    @property
    def description(self) -> str:
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
        self._snapshot: Snapshot | None = None
        self._samples: list[Sample] = []
        self._turn = 0
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
        if self._snapshot is None:
            return False
        self._turn = (self._turn + 1) % len(self._samples)
        if not self._forgotten and self._snapshot.is_current and not self._samples[self._turn].written():
            return True
        for sample in self._samples:
            for key in sample.written():
                self._known.pop(key, None)
        self._snapshot = None
        return False

    def digest(self) -> bytes:
        """Return the digest of `facts`; after `is_current` was False this reads weights."""
        if self._snapshot is None:
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
        self._snapshot = Snapshot(parts_of(root, _is_processor), names=_names_of)
        sampled = [each for each in counted.values() if can_be_sampled(each)]
        count = -(-len(sampled) // SAMPLED) or 1
        self._samples = [Sample(sampled[number::count], _spread) for number in range(count)]
        self._forgotten = False

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
        if (private or name[0] != "_" or name in _OF_ADAPTERS) and name != _CONFIGURATION and is_plain(each)
    }


def configuration_of(value: Any) -> dict[str, Any]:
    """Return the configuration of a component of Diffusers, without where it came from."""
    config = getattr(value, "config", None)
    items = config.items() if isinstance(config, Mapping) else ()
    return {name: each for name, each in items if name[0] != "_" and is_plain(each)}


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
        if processor is not None and not is_plain(processor):
            found[f"{start}processor"] = _of_processor(processor)
    # What is empty may be filled by a call.
    return {name: each for name, each in found.items() if each not in ([], {}, ())}


def _names_of(part: Any) -> list[str] | None:
    if not isinstance(part, nn.Module):
        return list(settings_of(part, private=True))
    if _is_of_torch(part):
        return None
    return list(settings_of(part) | {name: each for name, each in vars(part).items() if name == "processor"})


def _is_processor(name: str, value: Any) -> bool:
    return name == "processor" and not isinstance(value, nn.Module)


def _spread(shape: torch.Size) -> tuple[int, int]:
    """Return a few of the elements, the first among them; the stride is odd, to meet many columns of a matrix."""
    elements = shape.numel()
    stride = (elements - 1) // (_VALUES - 1)
    return min(elements, _VALUES), max(stride - (stride % 2 == 0), 1)


def _is_of_torch(module: nn.Module) -> bool:
    """Whether it is of torch's own class, of whose settings nobody changes one."""
    return type(module).__module__.startswith("torch.nn.")


def _of_processor(processor: Any) -> Any:
    if isinstance(processor, nn.Module) or not hasattr(processor, "__dict__"):
        return class_of(processor)
    return (class_of(processor), settings_of(processor, private=True))
