"""The state of encoders and tokenizers, as a digest: whatever could change an embedding changes it.

A weight counts by who it is, its version and a sample of its content. The version shows every change in place that
torch can see; the sample shows those made through `.data`, which torch cannot see: peft merges and unmerges this way,
and `module.to(torch.bfloat16).to(torch.float32)` rounds. The sample holds a few hundred elements of a weight, of an
embedding one in each row (textual inversion sets rows), so that a change through `.data` to a small part of another
weight is the one thing that goes unseen. Where a weight lies does
not count where something moves it between host and device, so an offloaded encoder keeps its state. All plain
attributes of all submodules count too: peft keeps its active adapters, scales and merges there, and transformers its
settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipeboost.reuse.content import PLAIN, NotKeyable, Serials
from pipeboost.seams import stock_class

MOST_SAMPLES = 2**18
"""Elements of one weight that are looked at, at most: one in each row even of the largest vocabularies."""

_FEWEST_SAMPLES = 2**8
_MANY_ITEMS = 1000
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SKIPPED = {
    *("_parameters", "_buffers", "_modules", "forward", "_old_forward"),
    *(*_HOOKS, "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
    # Saving, loading and training.
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_non_persistent_buffers_set", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    # What accelerate and Diffusers put on a model that they offload, anew for every call.
    *("_hf_hook", "_diffusers_hook", "to", "cuda", "cpu"),
    # What transformers notes while it runs.
    *("_output_capturing_hooks_installed", "deprecation_warnings"),
}


class StateDigest:
    """Takes in components one by one, then gives the digest of them all.

    Args:
        serials: tells objects apart; the same for all digests that are compared.
        placed: whether weights run where they lie. False where our own offload moves them.
    """

    def __init__(self, serials: Serials, *, placed: bool) -> None:
        self._serials = serials
        self._placed = placed
        self._facts: list[Any] = []
        self._samples: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
        self._order: list[tuple[torch.device, int]] = []
        self._seen: dict[int, int] = {}

    def add(self, name: str, value: Any) -> None:
        """Take in a component, or any other value.

        Raises:
            NotKeyable: it is in training mode, or its weights cannot be looked at.
        """
        self._facts.append((name, self._module(value) if isinstance(value, nn.Module) else self._value(value)))

    def digest(self) -> bytes:
        """The digest of everything taken in; waits for the device that the weights are on."""
        result = hashlib.blake2b(repr(self._facts).encode(), digest_size=20)
        with torch.no_grad():
            # One copy a device, however many weights; then in the order they came, wherever each of them lies.
            fetched = {
                group: iter(torch.cat(samples).cpu().split([sample.numel() for sample in samples]))
                for group, samples in self._samples.items()
            }
            for group in self._order:
                result.update(next(fetched[group]).numpy())
        return result.digest()

    def _module(self, root: nn.Module) -> Any:
        # Offloaded by accelerate or Diffusers, a model lies here or there, and runs on the pipeline's device.
        placed = self._placed and not {"_hf_hook", "_diffusers_hook"} & vars(root).keys()
        return [(name, self._submodule(module, placed)) for name, module in root.named_modules()]

    def _submodule(self, module: nn.Module, placed: bool) -> Any:
        if module.training:
            raise NotKeyable(f"{type(module).__name__} is in training mode")
        members = vars(module)
        forward = members.get("_old_forward", members.get("forward"))
        return (
            self._identity(stock_class(module)),
            None if forward is None else self._identity(getattr(forward, "__func__", forward)),
            [self._hooks(members[kind].values()) for kind in _HOOKS],
            [
                (name, self._weight(weight, placed, by_row=isinstance(module, nn.Embedding)))
                for name, weight in module._parameters.items()
                if weight is not None
            ],
            [(name, self._tensor(buffer, placed)) for name, buffer in module._buffers.items() if buffer is not None],
            self._members(members),
        )

    def _hooks(self, hooks: Iterable[Any]) -> Any:
        # Those of transformers only collect hidden states; they come with the first call that asks for any.
        return [self._identity(hook) for hook in hooks if not _of_transformers(hook)]

    def _weight(self, weight: torch.Tensor, placed: bool, *, by_row: bool) -> Any:
        if weight.is_inference():
            raise NotKeyable("a weight made in inference mode does not count its changes")
        return (self._serials.of(weight), weight._version, self._tensor(weight, placed, by_row=by_row))

    def _tensor(self, tensor: torch.Tensor, placed: bool, *, by_row: bool = False) -> Any:
        if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise NotKeyable(f"a {type(tensor).__name__} on {tensor.device} cannot be looked at")
        where = str(tensor.device) if placed else None
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = len(self._seen)
            sample = _sample(tensor.detach(), by_row=by_row)
            self._order.append((tensor.device, sample.element_size()))
            self._samples.setdefault(self._order[-1], []).append(sample)
        return (tensor.dtype, tuple(tensor.shape), where, self._seen[id(tensor)])

    def _members(self, members: dict[str, Any]) -> Any:
        return [
            (name, value if type(value) in PLAIN else self._value(value))
            for name, value in members.items()
            if name not in _SKIPPED and not name.startswith("_pipeboost")
        ]

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
            return self._tensor(value, placed=False)
        if hasattr(type(value), "push_to_hub") and not isinstance(value, nn.Module):
            return self._settings(value)
        return self._identity(value)

    def _settings(self, holder: Any) -> Any:
        """A configuration, tokenizer or processor: everything that is set on it."""
        if id(holder) in self._seen:
            return ("seen", self._seen[id(holder)])
        self._seen[id(holder)] = len(self._seen)
        added = holder.get_added_vocab() if hasattr(holder, "get_added_vocab") else None
        size = len(holder) if added is not None else None
        return (self._identity(type(holder)), size, added, self._members(vars(holder)))

    def _identity(self, value: Any) -> Any:
        try:
            return (type(value).__name__, self._serials.of(value))
        except TypeError:
            return (type(value).__name__, id(value))


def _of_transformers(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("transformers.")


def _sample(tensor: torch.Tensor, *, by_row: bool) -> torch.Tensor:
    """Some elements of a tensor as integers; all of a small one. With `by_row`, at least one of each row."""
    flat = tensor.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.numel() > _FEWEST_SAMPLES:
        stride = flat.numel() // _FEWEST_SAMPLES
        if by_row:
            # Less than a row, so that every row is met, and one column after the other.
            stride = max(min(flat.numel() // tensor.shape[0] - 1, stride), flat.numel() // MOST_SAMPLES, 1)
        flat = flat[::stride]
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
