"""`digest`: sixteen bytes that are the same on two ranks where a value is."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def digest(value: Any) -> bytes:
    """Sixteen bytes that are equal for equal values, whichever process has them.

    Numbers, texts, tensors, arrays and pictures count by content and kind (a tensor's device does not count),
    generators by state, containers by what is in them, callables and classes by being there. Any other object counts by
    its attributes; one that keeps none counts by its pickle, or by its class where it has no pickle.
    """
    digester = _Digester()
    digester.add(value)
    return digester.hash.digest()


class _Digester:
    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=16)
        self._inside: set[int] = set()

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self._add_bytes(type(value).__name__, repr(value).encode(errors="backslashreplace"))
        elif isinstance(value, torch.Tensor):
            self._add_tensor(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._add_array(np.asarray(value))
        elif isinstance(value, Image.Image):
            palette = value.getpalette() if value.mode in ("P", "PA") else None
            self._add_bytes(f"picture {value.mode} {value.size} {palette}", value.tobytes())
        elif isinstance(value, torch.Generator):
            self._add_bytes(f"generator {value.device.type}", value.get_state().numpy().tobytes())
        elif isinstance(value, (torch.dtype, torch.device)):
            self._add_bytes("torch", str(value).encode())
        elif callable(value):
            self._add_bytes("callable", b"")
        elif id(value) in self._inside:
            self._add_bytes("itself", b"")
        else:
            self._inside.add(id(value))
            self._add_composed(value)
            self._inside.remove(id(value))

    def _add_composed(self, value: Any) -> None:
        if isinstance(value, Mapping):
            items = sorted(value.items(), key=lambda item: repr(item[0]))
            self._add_all(f"mapping {len(items)}", [part for item in items for part in item])
        elif isinstance(value, (list, tuple)):
            self._add_all(f"{_kind(value)} {len(value)}", value)
        elif isinstance(value, (set, frozenset)):
            self._add_bytes(f"set {len(value)}", b"".join(sorted(map(digest, value))))
        elif attributes := getattr(value, "__dict__", None):
            self._add_all(_kind(value), [part for item in sorted(attributes.items()) for part in item])
        else:
            self._add_bytes(_kind(value), _pickled(value))

    def _add_all(self, kind: str, values: Any) -> None:
        self._add_bytes(kind, b"")
        for each in values:
            self.add(each)

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        kind = f"tensor {tensor.dtype} {tuple(tensor.shape)}"
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            self._add_bytes(f"{kind} {tensor.layout} {tensor.device.type}", b"")
            return
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        self._add_bytes(kind, plain.view(torch.uint8).numpy())

    def _add_array(self, array: np.ndarray[Any, Any]) -> None:
        kind = f"array {array.dtype} {array.shape}"
        if array.dtype.hasobject:  # whose bytes are addresses
            self._add_all(kind, array.ravel().tolist())
        else:
            self._add_bytes(kind, np.ascontiguousarray(array).tobytes())

    def _add_bytes(self, kind: str, content: Any) -> None:
        self.hash.update(f"{kind} {len(content)}:".encode())
        self.hash.update(content)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _pickled(value: Any) -> bytes:
    refusals: tuple[type[Exception], ...] = (pickle.PicklingError, TypeError, AttributeError, NotImplementedError)
    reduce: Callable[[Any], bytes] = pickle.dumps
    try:
        return reduce(value)
    except refusals:
        return b""
