"""The key of a call of `encode_prompt`: everything that what it returns could depend on.

A weight counts by who it is, its version and a sample of its content. The version shows every change in place that
torch can see; the sample shows those made through `.data`, which torch cannot see: peft merges and unmerges this way,
and `module.to(torch.bfloat16).to(torch.float32)` rounds. A change through `.data` that meets no element of the sample,
less than a row or column of a weight, is the one thing that goes unseen. Where a weight lies does not count where
something moves it between host and device, so an offloaded encoder keeps its state. All attributes of all submodules
count too: peft keeps its active adapters, scales and merges there, and transformers its settings.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from pipeboost.contract.call import Call
from pipeboost.core.fingerprint import Identity, identity, kind_of, numerics, structure, sums
from pipeboost.core.obstacles import hooks_in, modules_of
from pipeboost.core.sample import Sample, can_be_sampled, every_row_and_column
from pipeboost.core.seams import stock_class
from pipeboost.core.snapshot import Snapshot, own_names, parts_of
from pipeboost.features.reuse.store import Uncacheable

ENCODERS = ("text_encoder", "projection_model")
"""How the names of those models of Diffusers' own begin with which its pipelines encode; most encoders are others'."""
_OF_PIPELINES = ("acceleration", "_pipeboost_chains", "_num_timesteps", "_internal_dict")
"""Attributes of a pipeline that do not count: ours, what a script sets after it has encoded, and the configuration."""
_OFFLOADED = {"_hf_hook", "_diffusers_hook"}
_SKIPPED = _OFFLOADED | {"to", "cuda", "cpu", "_output_capturing_hooks_installed", "deprecation_warnings"}
"""Attributes that offloaders of accelerate and Diffusers set anew for every call, and transformers' notes to itself."""
_LONGEST = 1000
"""Containers of more items, such as vocabularies, do not count: tokenizers say what was added."""
_MOST_STATES = 64


class Keys:
    """Takes keys that can be compared with each other; keeps no module and no weight alive.

    Args:
        denoisers: attributes of the pipeline that hold its transformers, of which only dtype and configuration count.
    """

    def __init__(self, denoisers: tuple[str, ...]) -> None:
        self._denoisers = denoisers
        self._next = itertools.count()
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Free all memory; no key taken later equals one taken before."""
        self._known = WeakIdKeyDictionary()
        self._numbers: dict[Hashable, int] = {}

    def of(self, call: Call, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """Return the key of a call, or None where it must not be reused; waits for the devices of weights."""
        if any(["embeds" in name and value is not None for name, value in kwargs.items()]):
            return None

        def state_of(value: Any, _: Callable[[Any], Hashable]) -> Hashable:
            moves = call.has("offload") or _OFFLOADED & getattr(value, "__dict__", {}).keys()
            return self.state_of(value, placed=not moves)

        try:
            asked = structure((args, kwargs), tensor=content_of, other=refuse)
            found = structure(self._read_by(pipe), tensor=content_of, other=state_of)
        except Uncacheable:
            return None
        return stock_class(pipe), asked, found, str(call.device), numerics(call.device.type)

    def state_of(self, component: Any, *, placed: bool) -> Hashable:
        """Return the state of an encoder or tokenizer, or who another object is.

        Args:
            component: what encodes.
            placed: whether it runs where its weights lie, because nothing moves them.

        Raises:
            Uncacheable: it is in training mode, or its weights cannot be looked at.
        """
        if not _is_opened("", component):
            return Identity(component)
        with self._lock:
            known = self._known.get(component)
            if known is None or not known[0].is_current:
                known = self._known[component] = self._read(component)
            snapshot, sample, number, tokenizers = known
            sums_now = tuple(sample.sums()) if sample is not None else ()
            devices = frozenset([each.device for each in snapshot.tensors()]) if placed and sums_now else None
            # While a snapshot is current, all its parts are alive.
            vocabularies = [f"{len(each())} {each().added_tokens_decoder}" for each in tokenizers]
            return number, devices, sums_now, tuple(vocabularies)

    def _read(self, component: Any) -> tuple[Snapshot, Sample | None, int, list[Any]]:
        parts = parts_of(component, _is_opened)
        snapshot = Snapshot(parts, names=_names_of, hooks=True)
        if any(isinstance(each, nn.Module) and each.training for each in parts.values()):
            raise Uncacheable(f"{type(component).__name__} is in training mode")
        tensors = [each for each in snapshot.tensors() if each.numel()]
        weights = [each for each in tensors if isinstance(each, nn.Parameter)]
        # An offloader may put buffers of the same content in place of others.
        buffers = [each for each in tensors if not isinstance(each, nn.Parameter)]
        if not all(map(can_be_sampled, tensors)) or any(each.is_inference() for each in weights):
            raise Uncacheable(f"{type(component).__name__} has weights whose changes cannot be seen")
        if len(self._numbers) >= _MOST_STATES:
            self._numbers.clear()
        state = snapshot.state(), identity(weights), tuple(map(kind_of, buffers)), tuple(sums(buffers))
        number = self._numbers.setdefault(state, next(self._next))
        tokenizers = [weakref.ref(each) for each in parts.values() if hasattr(type(each), "added_tokens_decoder")]
        return snapshot, Sample(tensors, every_row_and_column) if tensors else None, number, tokenizers

    def _read_by(self, pipe: Any) -> dict[str, Any]:
        """Return what `encode_prompt` may read on a pipeline, by name.

        A script leaves on the pipeline what it was given for one call, under a private name that a property shows. No
        pipeline of Diffusers encodes by any of that, but for whether it guides; one of somebody else may.
        """
        from diffusers import ModelMixin, SchedulerMixin

        cls = stock_class(pipe)
        of_diffusers = cls.__module__.startswith("diffusers.")
        found = {"config": repr(dict(pipe.config)), "guides": getattr(pipe, "do_classifier_free_guidance", None)}
        for name, value in vars(pipe).items():
            encodes = not (isinstance(value, ModelMixin) and of_diffusers) or name.startswith(ENCODERS)
            of_call = name[0] == "_" and of_diffusers and isinstance(getattr(cls, name[1:], None), property)
            if name in self._denoisers and value is not None:
                found |= {f"{name} dtype": _dtype_of(value), f"{name} config": repr(dict(value.config))}
            elif encodes and not of_call and not isinstance(value, SchedulerMixin) and name not in _OF_PIPELINES:
                found[name] = value
        return found


def content_of(tensor: torch.Tensor) -> Hashable:
    """Return the content of a tensor, where it is cheap to read; else raise `Uncacheable`."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise Uncacheable(f"a tensor on {tensor.device} is dear to read")
    return (*kind_of(tensor), *sums([tensor]))


def refuse(value: Any, _: Callable[[Any], Hashable]) -> NoReturn:
    """Raise `Uncacheable`, for an argument whose content is unknown."""
    raise Uncacheable(f"a {type(value).__name__} cannot be distinguished from another")


def _dtype_of(denoiser: Any) -> torch.dtype:
    """Return its `dtype`, for which Diffusers takes milliseconds: it asks a thousand modules for a hook in vain."""
    weights = [weight for each in modules_of(denoiser) for weight in each._parameters.values() if weight is not None]
    dtypes = {weight.dtype for weight in weights}
    # Of several, Diffusers has rules which one it is.
    return dtypes.pop() if len(dtypes) == 1 and hooks_in(denoiser) is None else denoiser.dtype


def _is_opened(_: str, value: Any) -> bool:
    """Whether an object counts by its attributes: a module, configuration, tokenizer or processor."""
    return isinstance(value, nn.Module) or hasattr(type(value), "push_to_hub")


def _names_of(part: Any) -> list[str]:
    members = vars(part)
    skipped = {name for name, each in members.items() if isinstance(each, (dict, list)) and len(each) > _LONGEST}
    skipped |= _SKIPPED if "_old_forward" not in members else _SKIPPED | {"forward"}
    return [name for name in own_names(part) if name not in skipped]
