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
from pipeboost.core.fingerprint import version_of

CHUNK = 512 * 2**20
"""Bytes of one buffer: of one size, so that the device's allocator gives the next component the memory of the last."""

# The device allocator's own alignment, so that matrix libraries choose the kernel that they choose for stock's weights.
_ALIGNMENT = 512
_NEARLY_FULL = 0.97
_PORTABLE = 1


@dataclass
class Piece:
    """One piece of memory in a chunk, and the tensors that are it (several where weights are tied).

    Attributes:
        home: the device it came from.
        on_host: its view on the host.
        on_device: the view on the device that the tensors have while they are loaded.
        versions: their version counters when they were loaded.
    """

    tensors: list[torch.Tensor]
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    home: torch.device
    on_host: torch.Tensor | None = None
    on_device: torch.Tensor | None = None
    versions: list[int] = field(default_factory=list)

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a buffer that holds the chunk's bytes."""
        return self.raw(buffer).view(self.dtype).as_strided(self.shape, self.stride)

    def raw(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return its bytes in such a buffer."""
        return buffer[self.offset : self.offset + self.nbytes]


@dataclass(eq=False)
class Chunk:
    """A flat host buffer and what lies in it."""

    host: torch.Tensor
    pieces: list[Piece]

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

    @property
    def _held(self) -> list[tuple[torch.Tensor, Piece]]:
        return [(tensor, piece) for chunk in self.chunks for piece in chunk.pieces for tensor in piece.tensors]

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether the store consists of these tensors, none of them moved since. None may be loaded."""
        held = self._held
        same = set(map(id, tensors)) == {id(tensor) for tensor, _ in held}
        return same and all(_is_at(tensor, piece.on_host) for tensor, piece in held)

    def versions(self) -> list[int]:
        """Return how often each tensor was changed in place so far."""
        return [version_of(tensor) for tensor, _ in self._held]

    def adopt(self, tensors: Iterable[torch.Tensor], home: torch.device | None = None) -> None:
        """Make the store hold these tensors and no others: take in what is new or was moved, let go of what has left.

        None may be loaded.

        Args:
            home: where those that are taken in now are to go when they are released; None for where they are.
        """
        wanted = {id(tensor): tensor for tensor in tensors}
        for chunk in self.chunks:
            for piece in chunk.pieces:
                piece.tensors = [each for each in piece.tensors if id(each) in wanted and _is_at(each, piece.on_host)]
            chunk.pieces = [piece for piece in chunk.pieces if piece.tensors]
        # A chunk that is mostly holes costs more to send than to pack anew.
        kept = [each for each in self.chunks if 2 * sum(_aligned(piece.nbytes) for piece in each.pieces) > each.nbytes]
        scattered = {id(tensor): piece.home for tensor, piece in self._held}
        places = {_location(piece.tensors[0]): piece for chunk in kept for piece in chunk.pieces}
        known = {id(tensor) for piece in places.values() for tensor in piece.tensors}
        fresh: list[Piece] = []
        for key, tensor in wanted.items():
            if key in known:
                continue
            place = _location(tensor)
            if tensor.numel() and place in places:
                places[place].tensors.append(tensor)
                continue
            fresh.append(_piece(tensor, scattered.get(key) or home or tensor.device))
            places[place] = fresh[-1]
        self.chunks = kept
        for pieces, nbytes in _packed(fresh, self._chunk):
            self.chunks.append(Chunk(_host_buffer(nbytes, self._device), pieces))
            _fill(self.chunks[-1])

    def load(self, buffers: Iterable[torch.Tensor]) -> None:
        """Point the tensors at the device, where `buffers` are copies of the chunks, under way or arrived."""
        for chunk, buffer in zip(self.chunks, buffers, strict=True):
            for piece in chunk.pieces:
                piece.on_device = piece.view(buffer)
                for tensor in piece.tensors:
                    tensor.data = piece.on_device
                piece.versions = [version_of(tensor) for tensor in piece.tensors]

    def unload(self, buffers: Iterable[torch.Tensor]) -> bool:
        """Point the tensors back at the host, and write back those that were changed in place on the device.

        Returns:
            Whether all are back. False where the user moved one elsewhere meanwhile: `adopt` takes it in.
        """
        all_back = True
        for chunk, buffer in zip(self.chunks, buffers, strict=True):
            for piece in chunk.pieces:
                assert piece.on_host is not None
                ours = [_is_at(tensor, piece.on_device) for tensor in piece.tensors]
                changed = [
                    mine and (version < 0 or version_of(tensor) != version)
                    for mine, tensor, version in zip(ours, piece.tensors, piece.versions, strict=True)
                ]
                if any(changed):
                    piece.raw(chunk.host).copy_(piece.raw(buffer))
                for mine, tensor in zip(ours, piece.tensors, strict=True):
                    if mine:
                        tensor.data = piece.on_host
                all_back = all_back and all(ours)
                piece.on_device = None
        return all_back

    def release(self, home: torch.device | None = None) -> None:
        """Give every tensor memory of its own, where it came from or at `home`, and free the buffers."""
        while self.chunks:
            chunk = self.chunks[-1]
            for piece in chunk.pieces:
                ours = [tensor for tensor in piece.tensors if _is_at(tensor, piece.on_host)]
                if not ours:
                    continue
                own = torch.empty_strided(piece.shape, piece.stride, dtype=piece.dtype, device=home or piece.home)
                _raw(own).copy_(piece.raw(chunk.host))
                for tensor in ours:
                    tensor.data = own
            self.chunks.pop()


def _piece(tensor: torch.Tensor, home: torch.device) -> Piece:
    nbytes = _extent(tensor) * tensor.element_size()
    return Piece([tensor], 0, nbytes, tensor.dtype, tensor.shape, tensor.stride(), home)


def _packed(pieces: list[Piece], limit: int) -> Iterator[tuple[list[Piece], int]]:
    """Lay pieces out in chunks of at most `limit` bytes, the largest first; with each chunk's size.

    One that is larger than that has a chunk to itself. One nearly full is made full, so that they are alike.
    """
    chunks: list[tuple[list[Piece], int]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.nbytes):
        place = next((i for i, (_, end) in enumerate(chunks) if end + piece.nbytes <= limit), len(chunks))
        if place == len(chunks):
            chunks.append(([], 0))
        batch, end = chunks[place]
        piece.offset = end
        batch.append(piece)
        chunks[place] = batch, _aligned(end + piece.nbytes)
    for batch, end in chunks:
        yield batch, limit if _NEARLY_FULL * limit <= end <= limit else end


def _fill(chunk: Chunk) -> None:
    """Copy its pieces' bytes into a chunk, and point their tensors there."""
    for piece in chunk.pieces:
        piece.raw(chunk.host).copy_(_raw(piece.tensors[0].data))
        piece.on_host = piece.view(chunk.host)
        for tensor in piece.tensors:
            tensor.data = piece.on_host


def _host_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return host memory in whole pages, which `device` reads directly and which lives as long as its views."""
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


def _location(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _is_at(tensor: torch.Tensor, view: torch.Tensor | None) -> bool:
    return view is not None and _location(tensor) == _location(view)


def _extent(tensor: torch.Tensor) -> int:
    """Return the number of elements from its first to its last one in memory, gaps included."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes from its first to its last element; whatever its strides, copying them copies it."""
    return tensor.detach().as_strided((_extent(tensor),), (1,)).view(torch.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
