"""The embeddings that are kept: least recently used out first, bounded by their bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
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
        if any(type(value) not in PLAIN for value in written.values()):
            raise Uncacheable("it left more than plain values on the pipeline")
        copies: dict[int, torch.Tensor] = {}
        # A tensor made in inference mode could not be used by a call outside it.
        with torch.inference_mode(False), torch.no_grad():
            kept = _copied(returned, copies)
        devices = {copy.device for copy in copies.values() if copy.device.type == "cuda"}
        ready = tuple((device, torch.cuda.current_stream(device).record_event()) for device in devices)
        return cls(kept, written, sum(copy.untyped_storage().nbytes() for copy in copies.values()), ready)

    def repeat(self, pipe: Any) -> Any:
        """Do to the pipeline what was done, and give fresh copies of what was returned."""
        for device, event in self.ready:
            torch.cuda.current_stream(device).wait_event(event)
        vars(pipe).update(self.written)
        with torch.no_grad():
            return _copied(self.returned, {}, lent=True)


class Store:
    """Entries by key, safe to use from several threads.

    Args:
        max_bytes: the entries together are never larger.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry | None:
        """The entry, which thereby becomes the last to go."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: bytes, entry: Entry) -> None:
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


def _copied(value: Any, copies: dict[int, torch.Tensor], *, lent: bool = False) -> Any:
    if type(value) in PLAIN:
        return value
    if type(value) in (list, tuple):
        return type(value)(_copied(item, copies, lent=lent) for item in value)
    if type(value) is dict:
        return {key: _copied(item, copies, lent=lent) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or not _copyable(value):
        raise Uncacheable(f"a {type(value).__name__} is not kept")
    if id(value) not in copies:
        if lent and value.device.type == "cuda":
            # The store may drop it while this stream still reads.
            value.record_stream(torch.cuda.current_stream(value.device))
        copies[id(value)] = _twin(value)
    return copies[id(value)]


def _copyable(tensor: torch.Tensor) -> bool:
    plain = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
    return plain and not tensor.requires_grad and not tensor.is_conj() and not tensor.is_neg()


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, because a kernel may round otherwise for others."""
    if not tensor.numel():
        return tensor.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).clone().as_strided(tensor.shape, tensor.stride())
