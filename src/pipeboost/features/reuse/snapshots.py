"""What was found on a module once, so that a module nobody touched is known by the identity of its attributes.

A text encoder has hundreds of modules with thirty attributes each; comparing identities takes a microsecond a module.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeboost.core.seams import stock_class
from pipeboost.features.reuse.content import PLAIN, NotKeyable, Serials

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FORWARDS = ("forward", "_old_forward")
_SKIPPED = {
    *("_parameters", "_buffers", "_modules", *_FORWARDS),
    *(*HOOKS, "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One module's own attributes, its weights, buffers, hooks and submodules aside.

    Attributes:
        told: its class, its own forward, and all attributes but those in `open`.
        open: names of the attributes that may change in place, to be looked into every time.
        names: of all its attributes when this was taken.
        pick: gets the values that are told from its attributes.
        identities: of those values, and of its class.
        plain: the values that only this keeps from being replaced by others at the same address.
        watched: the same for the other values, which must not be kept alive: they may lead to weights.
        died: the watched ones that are gone; where there are any, an identity says nothing any more.
    """

    told: str
    open: tuple[str, ...]
    names: list[str]
    pick: Callable[[dict[str, Any]], tuple[Any, ...]]
    identities: list[int]
    plain: list[Any]
    watched: list[weakref.ref[Any]]
    died: list[weakref.ref[Any]]


class Snapshots:
    """The snapshots of modules; safe to use from several threads. It keeps no module and no weight alive."""

    def __init__(self) -> None:
        self.serials = Serials()
        self._known: dict[int, Snapshot] = {}
        self._full = 5000

    def clear(self) -> None:
        """Drop everything."""
        self._known = {}

    def of(self, module: nn.Module) -> Snapshot:
        """The snapshot of a module as it is now.

        Raises:
            NotKeyable: it is in training mode.
        """
        known = self._known.get(id(module))
        if known is not None and not known.died:
            members = module.__dict__
            # Names first: `pick` needs them all.
            if list(members) == known.names and _identities(module, known.pick(members)) == known.identities:
                return known
        return self._take(module)

    def identity(self, value: Any) -> tuple[str, int]:
        """Who an object is."""
        try:
            return (type(value).__name__, self.serials.of(value))
        except TypeError:
            return (type(value).__name__, id(value))

    def _take(self, module: nn.Module) -> Snapshot:
        if module.training:
            raise NotKeyable(f"{type(module).__name__} is in training mode")
        members, cls = dict(vars(module)), type(module)
        forward = members.get("_old_forward", members.get("forward"))
        function = getattr(forward, "__func__", forward)
        told: list[Any] = [self.identity(stock_class(module)), None if forward is None else self.identity(function)]
        opened: list[str] = []
        plain: list[Any] = []
        watched: list[Any] = [module, cls, *(members[name] for name in _FORWARDS if name in members)]
        # Two at least, so that a tuple is picked.
        picked = ["training", "training", *(name for name in _FORWARDS if name in members)]
        for name, value in attributes_of(members):
            if not _is_plain(value) and is_open(value):
                opened.append(name)
                continue
            picked.append(name)
            told.append((name, value if _is_plain(value) else self.identity(value)))
            (plain if _is_plain(value) else watched).append(value)
        pick = operator.itemgetter(*picked)
        identities = _identities(module, pick(members))
        died: list[weakref.ref[Any]] = []
        references = [weakref.ref(value, died.append) for value in watched]
        known = Snapshot(repr(told), tuple(opened), list(members), pick, identities, plain, references, died)
        self._known[id(module)] = known
        if len(self._known) > self._full:
            self._known = {key: each for key, each in list(self._known.items()) if not each.died}
            self._full = 2 * len(self._known) + 5000
        return known


def _identities(module: nn.Module, values: tuple[Any, ...]) -> list[int]:
    identities = list(map(id, values))
    identities.append(id(type(module)))
    return identities


def attributes_of(members: dict[str, Any]) -> list[tuple[str, Any]]:
    """The attributes that could change what a module, tokenizer or configuration does."""
    return [
        (name, value) for name, value in members.items() if name not in _SKIPPED and not name.startswith("_pipeboost")
    ]


def has_settings(value: Any) -> bool:
    """Whether a value is a configuration, tokenizer or processor."""
    return hasattr(type(value), "push_to_hub") and not isinstance(value, nn.Module)


def is_open(value: Any) -> bool:
    """Whether who a value is does not say what it is; or cannot be said without keeping it alive."""
    if isinstance(value, (list, tuple, set, frozenset, dict, torch.Tensor)) or has_settings(value):
        return True
    return not type(value).__weakrefoffset__


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) is tuple and all(map(_is_plain, value)))
