"""The key of a call of `encode_prompt`: everything that what it returns could depend on."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch

from pipeboost.contract.call import Call
from pipeboost.core.fingerprint import PLAIN, numerics, structure, sums
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.features.reuse.encoders import Encoders
from pipeboost.features.reuse.store import Uncacheable

METHOD = "encode_prompt"


class Key(NamedTuple):
    """What a result depends on.

    Attributes:
        digest: all of it.
        asked: the arguments, plain attributes and numerical settings.
    """

    digest: bytes
    asked: str


class Keys:
    """Takes keys that can be compared with each other.

    Args:
        denoisers: attributes of the pipeline that hold its transformers, of which only dtype and configuration count.
    """

    def __init__(self, denoisers: tuple[str, ...]) -> None:
        self._denoisers = denoisers
        self._encoders = Encoders()

    def clear(self) -> None:
        """Free all memory; keys taken later can still be compared with those taken before."""
        self._encoders.clear()

    def of(self, call: Call, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
        """Return the key of a call, or None where it must not be reused."""
        try:
            asked, found = self._dependencies(call, pipe, args, kwargs)
            state = self._encoders.digest(found, placed=not call.has("offload"))
        except Uncacheable:
            return None
        return Key(hashlib.blake2b(asked.encode() + state, digest_size=20).digest(), asked)

    def is_as_it_was(self, call: Call, pipe: Any, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the key of a call is still that one."""
        try:
            asked, found = self._dependencies(call, pipe, args, kwargs)
        except Uncacheable:
            return False
        if asked == key.asked and self._encoders.shows_no_change(found):
            return True
        # An offloader may have put buffers of the same content in place of others.
        now = self.of(call, pipe, args, kwargs)
        return now is not None and now.digest == key.digest

    def _dependencies(
        self, call: Call, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        from diffusers import ModelMixin, SchedulerMixin

        cls = stock_class(pipe)
        try:
            bound = signature_of(cls, METHOD).bind(pipe, *args, **kwargs)
        except TypeError as error:  # stock says what is wrong
            raise Uncacheable(str(error)) from error
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        if any("embeds" in name and value is not None for name, value in arguments.items()):
            raise Uncacheable("it is given embeddings")
        components, read = pipe.components, names_in(cls).read
        found: dict[str, Any] = {"config": pipe.config}
        for name, component in components.items():
            if name in self._denoisers:
                if component is not None:
                    found |= {f"{name} dtype": _dtype_of(component), f"{name} config": component.config}
            # An encoder may be reached by a name that its code puts together; Diffusers' own models are not encoders.
            elif name in read or not isinstance(component, (ModelMixin, SchedulerMixin)):
                found[name] = component
        own = {name: value for name, value in vars(pipe).items() if name in read and name not in components}
        plain = {name: value for name, value in own.items() if isinstance(value, PLAIN)}
        found |= {name: value for name, value in own.items() if name not in plain}
        asked = (
            cls.__module__,
            cls.__qualname__,
            content(arguments),
            repr(plain),
            str(call.device),
            numerics(call.device.type),
        )
        return repr(asked), found


class Names(NamedTuple):
    """The attributes that a method reads, and those that it sets."""

    read: frozenset[str]
    written: frozenset[str]


@functools.cache
def names_in(pipeline_class: type) -> Names:
    """Return what `encode_prompt` and the methods and properties it mentions, overridden ones included, touch.

    An embedding depends on more than arguments and encoders: a template, a maximal length, a scale set by the script.
    The names are an upper bound: one of the same name on another object counts too, and then only costs a miss.
    """
    from diffusers import DiffusionPipeline

    own = [cls for cls in pipeline_class.__mro__ if cls not in DiffusionPipeline.__mro__]
    names: dict[bool, set[str]] = {False: set(), True: set()}
    waiting, seen = [METHOD], {METHOD}
    while waiting:
        name = waiting.pop()
        for code in (code for cls in own for code in _code_of(vars(cls).get(name))):
            for instruction in dis.get_instructions(code):
                if instruction.opname.endswith(("_ATTR", "_METHOD")):
                    names[instruction.opname == "STORE_ATTR"].add(instruction.argval)
        waiting += names[False] - seen
        seen |= names[False]
    return Names(frozenset(names[False]), frozenset(names[True]))


def _code_of(member: Any) -> Iterator[CodeType]:
    member = getattr(member, "fget", getattr(member, "__func__", member))
    waiting = [getattr(inspect.unwrap(member), "__code__", None)] if callable(member) else []
    while waiting:
        if isinstance(code := waiting.pop(), CodeType):
            yield code
            waiting += code.co_consts


def _dtype_of(denoiser: Any) -> torch.dtype:
    """Its `dtype`, for which Diffusers takes milliseconds: it asks each of a thousand modules for a hook in vain."""
    dtypes: set[torch.dtype] = set()
    waiting = [denoiser]
    while waiting:
        if (module := waiting.pop()) is None:
            continue
        members = vars(module)
        if "_diffusers_hook" in members and members["_diffusers_hook"].hooks:
            return denoiser.dtype
        for weight in members["_parameters"].values():
            if weight is not None:
                dtypes.add(weight.dtype)
        waiting += [*members["_modules"].values()]
    # Of several, Diffusers has rules which one it is.
    only = dtypes.pop() if len(dtypes) == 1 else None
    return only if only is not None and only.is_floating_point else denoiser.dtype


def content(value: Any) -> Hashable:
    """Return what is equal, and has an equal `repr`, exactly where two arguments are.

    Raises:
        Uncacheable: it is, or holds, something whose content is unknown or dear to read, such as a tensor on a GPU.
    """
    return structure(value, tensor=_tensor_content, other=_refuse)


def _tensor_content(tensor: torch.Tensor) -> Hashable:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise Uncacheable(f"a tensor on {tensor.device} is dear to read")
    return (tensor.dtype, tuple(tensor.shape), *sums([tensor]))


def _refuse(value: Any, walk: Callable[[Any], Hashable]) -> Hashable:
    raise Uncacheable(f"a {type(value).__name__} cannot be told from another")
