"""What a value is, as something that can be hashed: arguments by their content, other objects by who they are."""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from typing import Any

import numpy as np
import torch
from PIL import Image

PLAIN = frozenset((type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size))


class NotKeyable(ValueError):  # noqa: N818 - a reason to run stock, not a failure
    """Nothing here tells two values apart cheaply and surely, so what depends on them must not be reused."""


class Serials:
    """Numbers objects by identity; no number is given twice, even where Python gives an address twice.

    It keeps nothing alive.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._next = itertools.count()
        self._full = 1000
        self._lock = threading.Lock()

    def of(self, obj: Any) -> int:
        """The object's number.

        Raises:
            TypeError: the object cannot be referred to weakly.
        """
        known = self._numbers.get(id(obj))
        if known is None or known[0]() is not obj:
            known = self._add(obj)
        return known[1]

    def fresh(self) -> int:
        """A number of no object."""
        return next(self._next)

    def _add(self, obj: Any) -> tuple[weakref.ref[Any], int]:
        with self._lock:
            known = self._numbers.get(id(obj))
            if known is None or known[0]() is not obj:
                known = self._numbers[id(obj)] = (weakref.ref(obj), next(self._next))
            if len(self._numbers) > self._full:
                self._numbers = {key: entry for key, entry in self._numbers.items() if entry[0]() is not None}
                self._full = 2 * len(self._numbers) + 1000
            return known


def content(value: Any) -> Any:
    """An argument as nested tuples whose `repr` is equal exactly where the arguments are.

    Pictures, arrays and CPU tensors count by their content.

    Raises:
        NotKeyable: it is, or holds, something else, such as a tensor on a GPU, whose content is dear to read.
    """
    if type(value) in PLAIN:
        return value
    if type(value) in (list, tuple):
        return (type(value).__name__, *map(content, value))
    if type(value) is dict:
        return ("dict", *((content(key), content(item)) for key, item in value.items()))
    if isinstance(value, Image.Image):
        palette = value.getpalette() if value.mode == "P" else None
        transparency = content(value.info.get("transparency"))
        return ("image", value.mode, value.size, palette, transparency, _digest(value.tobytes()))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return ("array", str(value.dtype), value.shape, _digest(np.ascontiguousarray(value).tobytes()))
    if type(value) is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided:
        array = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return ("tensor", value.dtype, tuple(value.shape), _digest(array))
    raise NotKeyable(f"a {type(value).__name__} cannot be told from another")


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()
