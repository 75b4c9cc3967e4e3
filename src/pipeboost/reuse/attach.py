"""`reuse_prompts`: one layer on a pipeline's `encode_prompt`, which gives back what the same call returned before.

Bit-identical to stock, because whatever the result could depend on is in the key: the arguments, the encoders' and
tokenizers' state, the attributes that the method reads, torch's numerical settings. A call is only remembered if it
left all of that as it was, drew no random number, and returned nothing but tensors and plain values.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from pipeboost.call import Call, current_call
from pipeboost.config import ReuseConfig
from pipeboost.ledger import Ledger
from pipeboost.reuse.content import PLAIN, NotKeyable, Serials, content
from pipeboost.reuse.names import names_in
from pipeboost.reuse.state import StateDigest
from pipeboost.reuse.store import Entry, Store
from pipeboost.seams import stock_class

DOOR = "encode_prompt"
# Inside the layer that takes the time of the stage, which is shown for a hit too.
REUSE_ORDER = -50.0


class PromptReuse:
    """The embeddings that one acceleration keeps, and the layer that keeps them.

    Args:
        settings: how much it may keep.
        owner: the acceleration; in the calls of others the layer is quiet. It is not kept alive.
        denoisers: attributes of the pipeline that hold its transformers: `encode_prompt` asks them for their dtype and
            configuration only, so that their weights do not count.
    """

    def __init__(self, settings: ReuseConfig, *, owner: object, denoisers: tuple[str, ...]) -> None:
        self.store = Store(settings.max_bytes)
        self._owner = weakref.ref(owner)
        self._denoisers = denoisers
        self._serials = Serials()

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptReuse:
        return self

    def clear(self) -> None:
        """Free all memory."""
        self.store.clear()

    def __call__(self, call_next: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        # Where gradients are on, the caller may want the graph that a copy does not have.
        ours = call is not None and call.owner is self._owner() and call.has("reuse") and not torch.is_grad_enabled()
        if call is None or not ours:
            return call_next(*args, **kwargs)
        counts = call.state.setdefault("reuse", {"hits": 0, "misses": 0, "passed": 0})
        key = self._key(call, pipe, args, kwargs)
        if key is None:
            counts["passed"] += 1
            return call_next(*args, **kwargs)
        entry = self.store.get(key)
        if entry is not None:
            counts["hits"] += 1
            return entry.repeat(pipe)
        counts["misses"] += 1
        return self._encode(call, pipe, key, call_next, args, kwargs)

    def _encode(
        self,
        call: Call,
        pipe: Any,
        key: bytes,
        call_next: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        attributes, random = dict(vars(pipe)), _random_state(call.device)
        returned = call_next(*args, **kwargs)
        written = names_in(stock_class(pipe), DOOR).written & vars(pipe).keys()
        for name in written:
            attributes.pop(name, None)
        others = {name: value for name, value in vars(pipe).items() if name not in written}
        untouched = attributes.keys() == others.keys() and all(attributes[name] is others[name] for name in others)
        if untouched and _random_state(call.device) == random:
            try:
                entry = Entry.of(returned, {name: vars(pipe)[name] for name in written})
            except NotKeyable:
                return returned
            self.store.put(key, entry)
        return returned

    def _key(self, call: Call, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
        """The key of a call, or None where it must not be reused."""
        cls = stock_class(pipe)
        try:
            bound = _signature(cls).bind(pipe, *args, **kwargs)
        except TypeError:
            return None  # stock says what is wrong
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        if any("embeds" in name and value is not None for name, value in arguments.items()):
            return None
        try:
            asked = content(arguments)
            state = self._state(call, pipe)
        except NotKeyable:
            return None
        told = repr((cls.__module__, cls.__qualname__, asked, str(call.device), _numerics(call.device.type)))
        return hashlib.blake2b(told.encode() + state, digest_size=20).digest()

    def _state(self, call: Call, pipe: Any) -> bytes:
        from diffusers import ModelMixin, SchedulerMixin

        names = names_in(stock_class(pipe), DOOR)
        digest = StateDigest(self._serials, placed=not call.has("offload"))
        components = pipe.components
        for name, component in components.items():
            if name in self._denoisers:
                digest.add(name, (component.dtype, component.config) if component is not None else None)
            # An encoder may be reached by a name that its code puts together; Diffusers' own models are not encoders.
            elif name in names.read or not isinstance(component, (ModelMixin, SchedulerMixin)):
                digest.add(name, component)
        for name, value in vars(pipe).items():
            if name in names.read and name not in components and name != "_internal_dict":
                digest.add(name, value)
        configuration = {name: value for name, value in pipe.config.items() if name not in components}
        digest.add("config", {name: value for name, value in configuration.items() if type(value) in PLAIN})
        return digest.digest()


def reuse_prompts(pipe: Any, prompts: PromptReuse, ledger: Ledger) -> None:
    """Look up what `pipe.encode_prompt` is asked, in calls of the acceleration that `prompts` belongs to.

    A pipeline and its shallow copies take the same `prompts`, and share what it keeps. What it did in a call can be
    read from `call.state["reuse"]`: `hits`, `misses`, and how many were `passed` on to stock because they could not be
    kept (given as embeddings, say, or encoded in training mode).

    Raises:
        AttributeError: the pipeline has no `encode_prompt`.
    """
    ledger.add_layer(pipe, DOOR, prompts, order=REUSE_ORDER)


@functools.cache
def _signature(pipeline_class: type) -> inspect.Signature:
    return inspect.signature(getattr(pipeline_class, DOOR))


def _random_state(device: torch.device) -> tuple[bytes, ...]:
    """The states of the generators that an encoder could draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)


def _numerics(device: str) -> tuple[Any, ...]:
    """The settings of torch and of this thread that change how an encoder rounds."""
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        (backends.fp32_precision, matmul.fp32_precision, backends.cudnn.conv.fp32_precision),
        backends.mkldnn.matmul.fp32_precision,
        (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        (backends.cudnn.enabled, backends.cudnn.deterministic, backends.cudnn.benchmark, backends.mkldnn.enabled),
        (backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled()),
        (backends.cuda.math_sdp_enabled(), backends.cuda.cudnn_sdp_enabled()),
    )
