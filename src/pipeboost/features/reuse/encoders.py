"""The state of encoders and tokenizers, as a digest: whatever could change an embedding changes it.

A weight counts by who it is, its version and a sample of its content. The version shows every change in place that
torch can see; the sample shows those made through `.data`, which torch cannot see: peft merges and unmerges this way,
and `module.to(torch.bfloat16).to(torch.float32)` rounds. A change through `.data` that meets no element of the sample,
less than a row or column of a weight, is the one thing that goes unseen. Where a weight lies does not count where
something moves it between host and device, so an offloaded encoder keeps its state. All attributes of all submodules
count too: peft keeps its active adapters, scales and merges there, and transformers its settings.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from pipeboost.core.fingerprint import structure, sums
from pipeboost.core.sample import Sample, can_be_sampled
from pipeboost.core.seams import stock_class
from pipeboost.features.reuse.look import MANY, Look, is_opened, vocabulary
from pipeboost.features.reuse.store import Uncacheable

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SKIPPED = {
    *("forward", "_old_forward"),
    *(*_HOOKS, "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
    # Saving, loading and training.
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_non_persistent_buffers_set", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    # How transformers loads, ties and spreads a model, which has been done when it encodes.
    *("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan", "_no_split_modules", "_skip_keys_device_placement"),
    *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "all_tied_weights_keys", "_keys_to_ignore_on_save"),
    *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"),
    # What accelerate and Diffusers put on a model that they offload, anew for every call.
    *("_hf_hook", "_diffusers_hook", "to", "cuda", "cpu"),
    # What transformers notes while it runs.
    *("_output_capturing_hooks_installed", "deprecation_warnings"),
}
_MOST_SAMPLES = 2**18
"""Elements of one weight that are looked at, about: one in each row even of the largest vocabularies."""
_FEWEST_SAMPLES = 2**8


class Encoders:
    """Digests of what encodes that can be compared with each other; it keeps no module and no weight alive."""

    def __init__(self) -> None:
        self._numbers = WeakIdKeyDictionary()
        self._strong: dict[int, tuple[Any, int]] = {}
        self._next = itertools.count()
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Free all memory; digests taken later can still be compared with those taken before."""
        self._look: Look | None = None
        self._facts = ""
        self._sample = Sample([], spread)

    def digest(self, found: Mapping[str, Any], *, placed: bool) -> bytes:
        """Return the digest of modules, tokenizers and other values, by name; waits for the devices of weights.

        Args:
            found: what encodes.
            placed: whether weights run where they lie. False where our own offload moves them.

        Raises:
            Uncacheable: it is in training mode, or its weights cannot be looked at.
        """
        with self._lock:
            if self._look is None or not self._look.finds_the_same(found):
                self._walk(found, placed)
            return hashlib.sha256(f"{self._facts} {self._sample.sums()}".encode()).digest()

    def shows_no_change(self, found: Mapping[str, Any]) -> bool:
        """Whether nothing was replaced or written to since the last digest, but perhaps through `.data`."""
        with self._lock:
            look = self._look
            return look is not None and look.shows_all_writes and look.finds_the_same(found)

    def number(self, value: Any) -> tuple[str, int]:
        """Return who an object is: no number is given twice, even where Python gives an address twice."""
        try:
            known = self._numbers.get(value)
            if known is None:
                known = self._numbers[value] = next(self._next)
        except TypeError:  # it cannot be referred to weakly
            _, known = self._strong.setdefault(id(value), (value, next(self._next)))
        return (type(value).__name__, known)

    def _walk(self, found: Mapping[str, Any], placed: bool) -> None:
        self._look = None
        seen: dict[int, int] = {}
        sampled: list[torch.Tensor] = []

        def tensor(value: torch.Tensor) -> Hashable:
            if id(value) not in seen:
                seen[id(value)] = len(seen)
                if value.numel():
                    if not can_be_sampled(value) or is_traceable_wrapper_subclass(value):
                        raise Uncacheable(f"a {type(value).__name__} on {value.device} cannot be looked at")
                    sampled.append(value)
            kind = (str(value.dtype), tuple(value.shape), seen[id(value)])
            if not isinstance(value, nn.Parameter):
                return (kind, *sums([value]))
            if value.is_inference():
                raise Uncacheable("a weight made in inference mode does not count its changes")
            return (kind, self.number(value), value._version)

        def other(value: Any, walk: Callable[[Any], Hashable]) -> Hashable:
            if not is_opened(value):
                return self.number(value)
            if id(value) in seen:
                return ("seen", seen[id(value)])
            seen[id(value)] = len(seen)
            own: Hashable = None
            if isinstance(value, nn.Module):
                if value.training:
                    raise Uncacheable(f"{type(value).__name__} is in training mode")
                own = self._of_module(value)
            elif hasattr(type(value), "added_tokens_decoder"):
                own = vocabulary(value)
            return (self.number(stock_class(value)), own, walk(_attributes_of(value)))

        facts = (structure(found, tensor=tensor, other=other), _places(found) if placed else None)
        self._facts = hashlib.sha256(repr(facts).encode()).hexdigest()
        self._sample = Sample(sampled, spread)
        self._look = Look(found, placed=placed)

    def _of_module(self, module: nn.Module) -> Hashable:
        members = vars(module)
        forward = members.get("_old_forward", members.get("forward"))
        # Hooks of transformers only collect hidden states; they come with the first call that asks for any.
        hooks = [
            tuple(self.number(hook) for hook in members[kind].values() if not _of_transformers(hook)) for kind in _HOOKS
        ]
        return (None if forward is None else self.number(getattr(forward, "__func__", forward)), *hooks)


def _attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that could change what a module, tokenizer or configuration does."""
    return {
        name: (type(each).__name__, len(each)) if isinstance(each, (dict, list)) and len(each) > MANY else each
        for name, each in vars(value).items()
        if name not in _SKIPPED and not name.startswith("_pipeboost")
    }


def _places(found: Mapping[str, Any]) -> Hashable:
    """The devices of weights, but for models that accelerate or Diffusers offload: they run on the pipeline's."""
    modules = [each for each in found.values() if isinstance(each, nn.Module)]
    placed = [each for each in modules if not {"_hf_hook", "_diffusers_hook"} & vars(each).keys()]
    return tuple(str(tensor.device) for each in placed for tensor in each.parameters())


def _of_transformers(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("transformers.")


@functools.lru_cache(maxsize=4096)
def spread(shape: torch.Size) -> tuple[int, int]:
    """Return how many elements are taken, and every which one: one at least of each row and column, all of a few."""
    elements = shape.numel()
    columns = shape[-1] if shape else 1
    wanted = max(_FEWEST_SAMPLES, columns, shape[0] if shape else 1)
    stride = max(elements // min(wanted, _MOST_SAMPLES), 1)
    # One column after the other: a stride that shares a factor with the row's length would skip some for ever.
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return -(-elements // stride), stride
