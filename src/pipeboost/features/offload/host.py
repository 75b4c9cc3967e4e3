"""Weights on the host, in few large pinned buffers whose views the parameters are while they wait.

A buffer is memory of our own, registered with CUDA: torch's pinned allocator would round it up to a power of two.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from pipeboost.core.errors import UnsupportedError

CHUNK = 512 * 2**20
"""Bytes of one buffer: of one size, so that the device's allocator gives the next component the memory of the last."""

# The device allocator's own alignment, so that matrix libraries choose the kernel that they choose for stock's weights.
_ALIGNMENT = 512
_NEARLY_FULL = 0.97
_PORTABLE = 1


@dataclass
class Entry:
    """One piece of memory in a chunk, and the tensors that are it (several where weights are tied).

    Attributes:
        home: the device it came from.
        here: its view on the host.
        place: the view on the device that the tensors have while they are loaded.
        versions: their version counters when they were loaded.
    """

    tensors: list[torch.Tensor]
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    home: torch.device
    here: torch.Tensor | None = None
    place: torch.Tensor | None = None
    versions: list[int] = field(default_factory=list)

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in a buffer that holds the chunk's bytes."""
        return self.raw(buffer).view(self.dtype).as_strided(self.shape, self.stride)

    def raw(self, buffer: torch.Tensor) -> torch.Tensor:
        """Its bytes in such a buffer."""
        return buffer[self.offset : self.offset + self.nbytes]


@dataclass(eq=False)
class Chunk:
    """A flat host buffer and what lies in it."""

    host: torch.Tensor
    entries: list[Entry]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.host.numel()


class HostStore:
    """The host memory of some tensors, which it points at the host or at copies of its chunks on the device."""

    def __init__(self, device: torch.device, *, chunk: int = CHUNK) -> None:
        self.chunks: list[Chunk] = []
        self._device = device
        self._chunk = chunk

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.nbytes for chunk in self.chunks)

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether the store consists of these tensors, none of them moved since. None may be loaded."""
        known = {
            id(tensor): _is(tensor, entry.here)
            for chunk in self.chunks
            for entry in chunk.entries
            for tensor in entry.tensors
        }
        wanted = {id(tensor) for tensor in tensors}
        return wanted == known.keys() and all(known.values())

    def versions(self) -> list[int]:
        """How often each tensor was changed in place so far."""
        return [_version(tensor) for chunk in self.chunks for entry in chunk.entries for tensor in entry.tensors]

    def adopt(self, tensors: Iterable[torch.Tensor], home: torch.device | None = None) -> None:
        """Make the store hold these tensors and no others: take in what is new or was moved, let go of what has left.

        None may be loaded.

        Args:
            home: where those that are taken in now are to go when they are released; None for where they are.
        """
        wanted = {id(tensor): tensor for tensor in tensors}
        for chunk in self.chunks:
            for entry in chunk.entries:
                entry.tensors = [each for each in entry.tensors if id(each) in wanted and _is(each, entry.here)]
            chunk.entries = [entry for entry in chunk.entries if entry.tensors]
        # A chunk that is mostly holes costs more to send than to pack anew.
        kept = [each for each in self.chunks if 2 * sum(_aligned(entry.nbytes) for entry in each.entries) > each.nbytes]
        scattered = {id(each): entry.home for chunk in self.chunks for entry in chunk.entries for each in entry.tensors}
        places = {_place(entry.tensors[0]): entry for chunk in kept for entry in chunk.entries}
        known = {id(tensor) for entry in places.values() for tensor in entry.tensors}
        fresh: list[Entry] = []
        for key, tensor in wanted.items():
            if key in known:
                continue
            place = _place(tensor)
            if tensor.numel() and place in places:
                places[place].tensors.append(tensor)
                continue
            fresh.append(_entry(tensor, scattered.get(key) or home or tensor.device))
            places[place] = fresh[-1]
        self.chunks = kept
        for entries, nbytes in _packed(fresh, self._chunk):
            self.chunks.append(Chunk(_host_buffer(nbytes, self._device), entries))
            _fill(self.chunks[-1])

    def load(self, buffers: Iterable[torch.Tensor]) -> None:
        """Point the tensors at the device, where `buffers` are copies of the chunks, under way or arrived."""
        for chunk, buffer in zip(self.chunks, buffers, strict=True):
            for entry in chunk.entries:
                entry.place = entry.view(buffer)
                for tensor in entry.tensors:
                    tensor.data = entry.place
                entry.versions = [_version(tensor) for tensor in entry.tensors]

    def unload(self, buffers: Iterable[torch.Tensor]) -> bool:
        """Point the tensors back at the host, and write back those that were changed in place on the device.

        Returns:
            Whether all are back. False where the user moved one elsewhere meanwhile: `adopt` takes it in.
        """
        all_back = True
        for chunk, buffer in zip(self.chunks, buffers, strict=True):
            for entry in chunk.entries:
                assert entry.here is not None
                ours = [_is(tensor, entry.place) for tensor in entry.tensors]
                changed = [
                    mine and (version < 0 or _version(tensor) != version)
                    for mine, tensor, version in zip(ours, entry.tensors, entry.versions, strict=True)
                ]
                if any(changed):
                    entry.raw(chunk.host).copy_(entry.raw(buffer))
                for mine, tensor in zip(ours, entry.tensors, strict=True):
                    if mine:
                        tensor.data = entry.here
                all_back = all_back and all(ours)
                entry.place = None
        return all_back

    def release(self, home: torch.device | None = None) -> None:
        """Give every tensor memory of its own, where it came from or at `home`, and free the buffers."""
        while self.chunks:
            chunk = self.chunks[-1]
            for entry in chunk.entries:
                ours = [tensor for tensor in entry.tensors if _is(tensor, entry.here)]
                if not ours:
                    continue
                own = torch.empty_strided(entry.shape, entry.stride, dtype=entry.dtype, device=home or entry.home)
                _raw(own).copy_(entry.raw(chunk.host))
                for tensor in ours:
                    tensor.data = own
            self.chunks.pop()


def _entry(tensor: torch.Tensor, home: torch.device) -> Entry:
    nbytes = _extent(tensor) * tensor.element_size()
    return Entry([tensor], 0, nbytes, tensor.dtype, tensor.shape, tensor.stride(), home)


def _packed(entries: list[Entry], limit: int) -> Iterator[tuple[list[Entry], int]]:
    """Lay entries out in chunks of at most `limit` bytes, the largest first; with each chunk's size.

    One that is larger than that has a chunk to itself. One nearly full is made full, so that they are alike.
    """
    chunks: list[tuple[list[Entry], int]] = []
    for entry in sorted(entries, key=lambda entry: -entry.nbytes):
        place = next((i for i, (_, end) in enumerate(chunks) if end + entry.nbytes <= limit), len(chunks))
        if place == len(chunks):
            chunks.append(([], 0))
        batch, end = chunks[place]
        entry.offset = end
        batch.append(entry)
        chunks[place] = batch, _aligned(end + entry.nbytes)
    for batch, end in chunks:
        yield batch, limit if _NEARLY_FULL * limit <= end <= limit else end


def _fill(chunk: Chunk) -> None:
    """Copy its entries' bytes into a chunk, and point their tensors there."""
    for entry in chunk.entries:
        entry.raw(chunk.host).copy_(_raw(entry.tensors[0].data))
        entry.here = entry.view(chunk.host)
        for tensor in entry.tensors:
            tensor.data = entry.here


def _host_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Host memory in whole pages of its own, from which `device` reads directly. It lives as long as its views do."""
    size = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages takes longer to pin, nothing more
            memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type == "cuda":
        _pin(buffer.data_ptr(), size, device)
        weakref.finalize(memory, _unpin, buffer.data_ptr(), device).atexit = False
    return buffer[:nbytes]


def _pin(address: int, size: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        result = int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE))
    if result != 0:
        raise UnsupportedError(
            f"the host gave no {size / 2**20:.0f} MiB more of pinned memory (CUDA error {result}) for offload; "
            "use offload=None or Diffusers' pipe.enable_model_cpu_offload()"
        )


def _unpin(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _is(tensor: torch.Tensor, view: torch.Tensor | None) -> bool:
    return view is not None and _place(tensor) == _place(view)


def _version(tensor: torch.Tensor) -> int:
    """How often it was changed in place; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _extent(tensor: torch.Tensor) -> int:
    """Elements from its first to its last one in memory, gaps included."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes from its first to its last element; whatever its strides, copying them copies it."""
    return tensor.detach().as_strided((_extent(tensor),), (1,)).view(torch.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
