"""The embeddings that are kept: least recently used out first, bounded by their bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipeboost.core.fingerprint import PLAIN


class Uncacheable(ValueError):  # noqa: N818 - a reason to run stock, not a failure
    """Nothing tells two values apart cheaply and surely, so what depends on them must not be reused."""


@dataclass(frozen=True)
class Entry:
    """What one `encode_prompt` did.

    Attributes:
        returned: copies of what it returned.
        written: the attributes it left on the pipeline.
        size: bytes of the copies.
        ready: for each GPU, when the copies there are complete; another thread may read them on another stream.
    """

    returned: Any
    written: dict[str, Any]
    size: int
    ready: tuple[tuple[torch.device, torch.cuda.Event], ...]

    @classmethod
    def of(cls, returned: Any, written: dict[str, Any]) -> Entry:
        """Keep copies, which share nothing with the originals.

        Raises:
            Uncacheable: something in it is not a plain value or tensor.
        """
        # A tensor made in inference mode could not be used by a call outside it.
        with torch.inference_mode(False), torch.no_grad():
            kept, copies = _copied(returned)
        devices = {copy.device for copy in copies if copy.device.type == "cuda"}
        ready = tuple((device, torch.cuda.current_stream(device).record_event()) for device in devices)
        return cls(kept, written, sum(copy.untyped_storage().nbytes() for copy in copies), ready)

    def repeat(self, pipe: Any) -> Any:
        """Do to the pipeline what was done, and return fresh copies of what was returned."""
        for device, event in self.ready:
            torch.cuda.current_stream(device).wait_event(event)
        vars(pipe).update(self.written)
        with torch.no_grad():
            returned, _ = _copied(self.returned, lent=True)
        return returned


class Store:
    """Entries by key, safe to use from several threads; together they are never larger than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry, which thereby becomes the last to go."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, entry: Entry) -> None:
        """Keep an entry, if it fits at all, and drop what then is too much."""
        if entry.size > self.max_bytes:
            return
        with self._lock:
            replaced = self._entries.pop(key, None)
            self.size += entry.size - (replaced.size if replaced is not None else 0)
            self._entries[key] = entry
            while self.size > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.size -= oldest.size

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
            self.size = 0


def _copied(value: Any, *, lent: bool = False) -> tuple[Any, Iterable[torch.Tensor]]:
    copies: dict[int, torch.Tensor] = {}

    def copied(leaf: Any) -> Any:
        if type(leaf) in PLAIN:
            return leaf
        if not isinstance(leaf, torch.Tensor) or not _is_plain(leaf):
            raise Uncacheable(f"a {type(leaf).__name__} is not kept")
        if id(leaf) not in copies:
            if lent and leaf.device.type == "cuda":
                # The store may drop it while this stream still reads.
                leaf.record_stream(torch.cuda.current_stream(leaf.device))
            copies[id(leaf)] = _twin(leaf)
        return copies[id(leaf)]

    return pytree.tree_map(copied, value), copies.values()


def _is_plain(tensor: torch.Tensor) -> bool:
    strided = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
    return strided and not tensor.requires_grad and not tensor.is_conj() and not tensor.is_neg()


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides, because a kernel may round otherwise for others."""
    if not tensor.numel():
        return tensor.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).clone().as_strided(tensor.shape, tensor.stride())
