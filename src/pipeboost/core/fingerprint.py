"""What a value is: `identity` says it within a process, `digest` on every rank that holds an equal one.

Both walk a value in the same way (`structure`) and differ in two things: what they make of a tensor, and what they make
of an object that is neither plain nor a container.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipeboost.core.seams import stock_class

PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
"""Types of values that are what their `repr` says."""
_ROW = 2**14
"""Words of eight bytes that are weighted at once."""
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def identity(value: Any) -> Hashable:
    """Return what is equal for two values as long as both are the same, unchanged, within this process.

    Plain values, containers, arrays, pictures and generators count by content. A tensor counts by who it is, its
    version, dtype and shape; torch counts no write through `.data`, and none to an inference tensor, so neither shows
    here. Any other object counts by who it is; nothing is kept alive that can be referred to weakly.
    """
    return structure(value, tensor=_tensor_identity, other=lambda each, _: _state_of(each) or Identity(each))


def digest(value: Any) -> bytes:
    """Return sixteen bytes that are equal for equal values, whichever process has them.

    Numbers, texts, tensors, arrays and pictures count by content and kind (a tensor's device does not count),
    generators by state, containers by what is in them, callables and classes by being there. Any other object counts by
    its attributes; one that keeps none counts by its pickle, or by its class where it has no pickle.
    """
    found = structure(value, tensor=lambda tensor: (*kind_of(tensor), *sums([tensor])), other=_content)
    return hashed(repr(found))


def hashed(content: str) -> bytes:
    """Return sixteen bytes of a text. The number of a device in it does not count: each rank has one of its own."""
    content = re.sub(r"(device\(type=\\*'\w+\\*'), index=\d+\)", r"\1)", content)
    return hashlib.blake2b(content.encode(errors="backslashreplace"), digest_size=16).digest()


def structure(
    value: Any,
    *,
    tensor: Callable[[torch.Tensor], Hashable],
    other: Callable[[Any, Callable[[Any], Hashable]], Hashable],
) -> Hashable:
    """Return a value as nested tuples that are equal where values are, and whose `repr` is if that of the leaves is.

    Args:
        tensor: what a tensor becomes.
        other: what an object becomes that is neither plain nor a container, array or picture. It is given
            the walk itself, to go on inside the object. What it raises comes through.
    """
    return _Walk(tensor, other)(value)


class _Walk:
    """A walk through one value; unlike functions that call each other, it is gone as soon as it has ended."""

    def __init__(self, tensor: Callable[..., Hashable], other: Callable[..., Hashable]) -> None:
        self._tensor = tensor
        self._other = other
        self._inside: set[int] = set()

    def __call__(self, value: Any) -> Hashable:
        if isinstance(value, PLAIN):
            # As text: 1, 1.0 and True are equal, as are 0.0 and -0.0, and NaN equals nothing.
            return (type(value).__name__, repr(value))
        if isinstance(value, torch.Tensor):
            return ("tensor", self._tensor(value))
        if isinstance(value, Image.Image):
            palette = value.getpalette() if value.mode in ("P", "PA") else None
            transparency = repr(value.info.get("transparency"))
            return ("picture", value.mode, value.size, repr(palette), transparency, _hash(value.tobytes()))
        if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            return ("array", str(value.dtype), value.shape, _hash(np.ascontiguousarray(value).tobytes()))
        if id(value) in self._inside:
            return ("itself",)
        self._inside.add(id(value))
        try:
            return self._opened(value)
        finally:
            self._inside.discard(id(value))

    def _opened(self, value: Any) -> Hashable:
        if isinstance(value, (list, tuple)):
            return (type(value).__qualname__ if type(value) in (list, tuple) else class_of(value), *map(self, value))
        if isinstance(value, (dict, Mapping)):
            return ("mapping", *[(self(key), self(value[key])) for key in sorted(value, key=repr)])
        if isinstance(value, (set, frozenset)):
            return ("set", *sorted(map(self, value), key=repr))
        if isinstance(value, np.ndarray):  # of objects, whose bytes are addresses
            return ("array", value.shape, *map(self, value.ravel().tolist()))
        return self._other(value, self)


class Identity:
    """Who an object is: equal to another one of the same object, while that lives, and then to itself alone."""

    __slots__ = ("_id", "_object")

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._object: Callable[[], Any] = weakref.ref(value)
        except TypeError:  # it stays alive, so that no other one gets its place
            self._object = lambda: value

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        known = isinstance(other, Identity) and self._id == other._id
        return known and self._object() is not None and self._object() is other._object()  # type: ignore[attr-defined]


def numerics(kind: str) -> Hashable:
    """Return the settings of torch and of this thread by which the same code computes otherwise on a kind of device."""
    cuda, precision = torch.backends.cuda, torch._C._get_fp32_precision_getter
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
        (precision("generic", "all"), precision("mkldnn", "matmul"), torch._C._get_mkldnn_enabled()),
        (precision("cuda", "matmul"), precision("cuda", "conv")),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        (torch._C._get_cudnn_enabled(), torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        (cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


def class_of(value: Any) -> str:
    """Return the full name of an object's stock class."""
    cls = stock_class(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and shape of a tensor, as they are the same on all ranks."""
    return str(tensor.dtype), tuple(tensor.shape)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often torch has seen a tensor be written to; -1 where it does not count."""
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def sums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return the content of each tensor as a sum of its bits, whose terms are weighted by their place.

    The sums are made where the tensors lie; of each device one copy comes to the host. What has no memory that could be
    looked at counts as 0.
    """
    parts: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    columns: dict[torch.device, torch.Tensor] = {}
    count = 0
    for place, tensor in enumerate(tensors):
        count += 1
        for number, plain in enumerate(_plain(tensor)):
            if plain.numel():
                device = plain.device
                if device not in columns:
                    columns[device] = place_weights(torch.arange(_ROW, device=device))
                parts.setdefault(device, []).append((place, _sum(plain, columns[device]) * (2 * number + 1)))
    result = [0] * count
    for found in parts.values():
        values = torch.stack([value for _, value in found]).tolist()
        for (place, _), value in zip(found, values, strict=True):
            result[place] = (result[place] + value) % 2**64
    return result


def place_weights(places: torch.Tensor) -> torch.Tensor:
    """Return an odd pseudo-random int64 factor for each place, an int64: a change of one term always shows."""
    mixed = (places + 1) * _GOLDEN
    mixed = (mixed ^ (mixed >> 29)) * (0xBF58476D1CE4E5B9 - 2**64)
    mixed = (mixed ^ (mixed >> 32)) * (0x94D049BB133111EB - 2**64)
    return mixed | 1


def _sum(plain: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the sum of one contiguous tensor, its last word filled up with zeros; `columns` are a row's weights."""
    content = plain.reshape(-1).view(torch.uint8)
    if content.numel() % 8:
        content = torch.nn.functional.pad(content, (0, -content.numel() % 8))
    elif content.storage_offset() % 8:  # a word must not begin between two others
        content = content.clone()
    words = content.view(torch.int64)
    rows, rest = divmod(words.numel(), _ROW)
    total = (_folded(words[rows * _ROW :]) * columns[:rest]).sum()
    if rows:
        # What the processor's cache holds; a GPU wants more at once.
        at_once = 2**3 if plain.device.type == "cpu" else 2**8
        weights = place_weights(torch.arange(_ROW, _ROW + rows, device=plain.device))
        blocks = words[: rows * _ROW].view(rows, _ROW).split(at_once)
        for block, factors in zip(blocks, weights.split(at_once), strict=True):
            total += ((_folded(block) * columns).sum(1) * factors).sum()
    return total


def _folded(words: torch.Tensor) -> torch.Tensor:
    """Return the words with their high half in the low one too: of a sign bit alone, a product would keep no place."""
    return words ^ (words >> 32)


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the memory of a tensor as contiguous tensors; nothing where there is none that can be looked at."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [each for name in names for each in _plain(getattr(tensor, name))]
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return []
    return [tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()]


def _tensor_identity(tensor: torch.Tensor) -> Hashable:
    return Identity(tensor), version_of(tensor), tensor.dtype, tensor.shape


def _state_of(value: Any) -> Hashable:
    if isinstance(value, torch.Generator):
        return ("generator", value.device.type, _hash(value.get_state().numpy()))
    return None


def _content(value: Any, walk: Callable[[Any], Hashable]) -> Hashable:
    if state := _state_of(value):
        return state
    if callable(value):
        return ("callable",)
    if attributes := getattr(value, "__dict__", None):
        return (class_of(value), walk(attributes))
    return (class_of(value), _hash(_pickled(value)))


def _hash(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _pickled(value: Any) -> bytes:
    with contextlib.suppress(pickle.PicklingError, TypeError, AttributeError, NotImplementedError):
        return pickle.dumps(value)
    return b""
