"""The key of a call of `encode_prompt`: everything that what it returns could depend on."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch

from pipeboost.contract.call import Call
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.features.reuse.content import PLAIN, NotKeyable, content
from pipeboost.features.reuse.names import names_in
from pipeboost.features.reuse.snapshots import Snapshots
from pipeboost.features.reuse.state import StateDigest

DOOR = "encode_prompt"


class Key(NamedTuple):
    """What a result depends on.

    Attributes:
        digest: all of it; None where the content of weights was left out.
        asked: the arguments and numerical settings.
        state: what encodes.
    """

    digest: bytes | None
    asked: bytes
    state: StateDigest

    def touched(self, before: Key) -> bool:
        """Whether anything was replaced or changed since, in a way that Python or torch shows."""
        return self.asked != before.asked or self.state.trace() != before.state.trace()


class Keys:
    """Takes keys that can be compared with each other.

    Args:
        denoisers: attributes of the pipeline that hold its transformers, of which only dtype and configuration count.
    """

    def __init__(self, denoisers: tuple[str, ...]) -> None:
        self._denoisers = denoisers
        self._snapshots = Snapshots()

    def clear(self) -> None:
        """Free all memory; keys taken later can still be compared with those taken before."""
        self._snapshots.clear()

    def of(
        self, call: Call, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, sampled: bool = True
    ) -> Key | None:
        """The key of a call, or None where it must not be reused."""
        cls = stock_class(pipe)
        try:
            bound = signature_of(cls, DOOR).bind(pipe, *args, **kwargs)
        except TypeError:
            return None  # stock says what is wrong
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        if any("embeds" in name and value is not None for name, value in arguments.items()):
            return None
        try:
            asked = content(arguments)
            state = self._state(call, pipe, sampled=sampled)
        except NotKeyable:
            return None
        told = repr((cls.__module__, cls.__qualname__, asked, str(call.device), _numerics(call.device.type))).encode()
        digest = hashlib.blake2b(told + state.digest(), digest_size=20).digest() if sampled else None
        return Key(digest, told, state)

    def _state(self, call: Call, pipe: Any, *, sampled: bool = True) -> StateDigest:
        from diffusers import ModelMixin, SchedulerMixin

        names = names_in(stock_class(pipe), DOOR)
        digest = StateDigest(self._snapshots, placed=not call.has("offload"), sampled=sampled)
        components = pipe.components
        for name, component in components.items():
            if name in self._denoisers:
                digest.add(name, (_dtype_of(component), component.config) if component is not None else None)
            # An encoder may be reached by a name that its code puts together; Diffusers' own models are not encoders.
            elif name in names.read or not isinstance(component, (ModelMixin, SchedulerMixin)):
                digest.add(name, component)
        for name, value in vars(pipe).items():
            if name in names.read and name not in components and name != "_internal_dict":
                digest.add(name, value)
        configuration = {name: value for name, value in pipe.config.items() if name not in components}
        digest.add("config", {name: value for name, value in configuration.items() if type(value) in PLAIN})
        return digest


def _dtype_of(denoiser: Any) -> torch.dtype:
    """Its `dtype`, for which Diffusers takes milliseconds: it asks each of a thousand modules for a hook in vain."""
    dtypes: set[torch.dtype] = set()
    waiting = [denoiser]
    while waiting:
        members = waiting.pop().__dict__
        if "_diffusers_hook" in members:
            return denoiser.dtype
        if weights := members["_parameters"]:
            dtypes.update([weight.dtype for weight in weights.values() if weight is not None])
        if modules := members["_modules"]:
            waiting += [module for module in modules.values() if module is not None]
    # Of several, Diffusers has rules which one it is.
    only = dtypes.pop() if len(dtypes) == 1 else None
    return only if only is not None and only.is_floating_point else denoiser.dtype


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
