"""The state of encoders and tokenizers, as a digest: whatever could change an embedding changes it.

A weight counts by who it is, its version and a sample of its content. The version shows every change in place that
torch can see; the sample shows those made through `.data`, which torch cannot see: peft merges and unmerges this way,
and `module.to(torch.bfloat16).to(torch.float32)` rounds. A change through `.data` that meets no element of the sample,
less than a column of a weight or a row of an embedding, is the one thing that goes unseen. Where a weight lies does
not count where something moves it between host and device, so an offloaded encoder keeps its state. All plain
attributes of all submodules count too: peft keeps its active adapters, scales and merges there, and transformers its
settings.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipeboost.features.reuse.content import PLAIN, NotKeyable
from pipeboost.features.reuse.sample import Samples
from pipeboost.features.reuse.snapshots import HOOKS, Snapshots, attributes_of, has_settings

_MANY_ITEMS = 1000
_ORDINARY = (nn.Parameter, torch.Tensor)


class StateDigest:
    """Takes in components one by one, then gives the digest of them all.

    Facts are kept as strings: thousands of tuples would wake Python's garbage collector, in the middle of every key.

    Args:
        snapshots: what is known of modules; the same for all digests that are compared.
        placed: whether weights run where they lie. False where our own offload moves them.
        sampled: whether the content of weights is looked at. False for a `trace` alone.
    """

    def __init__(self, snapshots: Snapshots, *, placed: bool, sampled: bool = True) -> None:
        self._snapshots = snapshots
        self._serial = snapshots.serials.of
        self._placed = placed
        self._facts: list[str] = []
        self._touches: list[str] = []
        self._samples = Samples() if sampled else None
        self._seen: dict[int, int] = {}

    def add(self, name: str, value: Any) -> None:
        """Take in a component, or any other value.

        Raises:
            NotKeyable: it is in training mode, or its weights cannot be looked at.
        """
        self._facts.append(name)
        if isinstance(value, nn.Module):
            self._module(value)
        else:
            self._facts.append(repr(self._value(value)))

    def digest(self) -> bytes:
        """The digest of everything taken in; waits for the device that the weights are on."""
        assert self._samples is not None
        # Most processors have instructions for SHA-256, and the samples of a large encoder are megabytes.
        result = hashlib.sha256("\0".join(self._facts).encode())
        self._samples.update(result)
        # The samples are views, which would keep weights where they are now.
        self._samples = None
        return result.digest()

    def trace(self) -> tuple[list[str], list[str]]:
        """Everything but content: while it stays as it was, nothing was touched in a way that torch or Python shows.

        If it does not, the state may still be the same, for tensors other than parameters count by who they are.
        """
        return (self._facts, self._touches)

    def _module(self, root: nn.Module) -> None:
        # Offloaded by accelerate or Diffusers, a model lies here or there, and runs on the pipeline's device.
        placed = self._placed and not {"_hf_hook", "_diffusers_hook"} & vars(root).keys()
        facts, seen = self._facts, self._seen
        waiting: list[tuple[str, nn.Module | None]] = [("", root)]
        while waiting:
            name, module = waiting.pop()
            facts.append(name)
            if module is None or id(module) in seen:
                facts.append("none" if module is None else f"seen {seen[id(module)]}")
                continue
            seen[id(module)] = len(seen)
            self._submodule(module, placed)
            if submodules := module._modules:
                facts.append(f"{len(submodules)} submodules")
                waiting += submodules.items()

    def _submodule(self, module: nn.Module, placed: bool) -> None:
        members, known, facts = module.__dict__, self._snapshots.of(module), self._facts
        facts.append(known.told)
        for kind in HOOKS:
            if members[kind] and (hooks := self._hooks(members[kind])):
                facts.append(f"{kind} {hooks}")
        if weights := members["_parameters"]:
            by_row = isinstance(module, nn.Embedding)
            for name, weight in weights.items():
                if weight is not None:
                    if weight.is_inference():
                        raise NotKeyable("a weight made in inference mode does not count its changes")
                    told = self._tensor(weight, placed, by_row=by_row)
                    facts.append(f"{name} {self._serial(weight)} {weight._version} {told}")
        if buffers := members["_buffers"]:
            facts += [f"{name} {self._content(each, placed)}" for name, each in buffers.items() if each is not None]
        for name in known.open:
            facts.append(f"{name} {self._value(members[name])!r}")

    def _hooks(self, hooks: Mapping[int, Any]) -> Any:
        # Those of transformers only collect hidden states; they come with the first call that asks for any.
        return [self._snapshots.identity(hook) for hook in hooks.values() if not _of_transformers(hook)]

    def _content(self, tensor: torch.Tensor, placed: bool) -> str:
        """A tensor that counts by its content alone."""
        if tensor.is_inference():
            # Without a version, nothing but the content can say that it is as it was.
            self._touches.append(f"{self._snapshots.serials.fresh()}")
        else:
            self._touches.append(f"{self._serial(tensor)} {tensor._version}")
        return self._tensor(tensor, placed)

    def _tensor(self, tensor: torch.Tensor, placed: bool, *, by_row: bool = False) -> str:
        strided = tensor.layout is torch.strided and tensor.device.type != "meta"
        if not strided or (type(tensor) not in _ORDINARY and is_traceable_wrapper_subclass(tensor)):
            raise NotKeyable(f"a {type(tensor).__name__} on {tensor.device} cannot be looked at")
        number = self._seen.get(id(tensor))
        if number is None:
            number = self._seen[id(tensor)] = len(self._seen)
            if self._samples is not None:
                self._samples.add(tensor, by_row=by_row)
        return f"{_kind(tensor.dtype, tensor.shape, tensor.device if placed else None)} {number}"

    def _value(self, value: Any) -> Any:
        if type(value) in PLAIN:
            return value
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            # A vocabulary: the tokenizer's own length tells of added tokens.
            if len(value) > _MANY_ITEMS:
                return (type(value).__name__, len(value))
            if isinstance(value, dict):
                return [(self._value(key), self._value(item)) for key, item in value.items()]
            items = [self._value(item) for item in value]
            return (type(value).__name__, sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items)
        if isinstance(value, torch.Tensor):
            return self._content(value, placed=False)
        return self._settings(value) if has_settings(value) else self._snapshots.identity(value)

    def _settings(self, holder: Any) -> Any:
        """A configuration, tokenizer or processor: everything that is set on it."""
        if id(holder) in self._seen:
            return ("seen", self._seen[id(holder)])
        self._seen[id(holder)] = len(self._seen)
        added = holder.get_added_vocab() if hasattr(holder, "get_added_vocab") else None
        size = len(holder) if added is not None else None
        members = [(name, self._value(value)) for name, value in attributes_of(vars(holder))]
        return (self._snapshots.identity(type(holder)), size, added, members)


def _of_transformers(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("transformers.")


@functools.lru_cache(maxsize=4096)
def _kind(dtype: torch.dtype, shape: torch.Size, device: torch.device | None) -> str:
    return f"{dtype} {tuple(shape)} {device}"
