"""Any value on its way to other ranks: its tensors, and a pickle of everything else."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pipeboost.core.errors import PipeboostError


class TensorLayout(NamedTuple):
    """What a rank must know of a tensor to receive it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def empty(self, device: torch.device) -> torch.Tensor:
        """Return a tensor of this kind; on `device`, if it comes from a device of that type, else on the CPU."""
        where = device if self.device == device.type else torch.device("cpu")
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=where)


class Known:
    """Objects that every rank has, each rank its own, in one order: they stay where they are.

    A tensor among them that was written to since is brought to what it has become, in place.
    """

    def __init__(self, objects: Sequence[Any]) -> None:
        self.objects = list(objects)
        self._places = {id(each): place for place, each in enumerate(self.objects)}
        self._versions = [_version(each) for each in self.objects]

    def place(self, obj: Any) -> int | None:
        """Return where an object stands among these; None if it is none of them."""
        return self._places.get(id(obj))

    def changed(self, place: int) -> bool:
        """Whether it is a tensor that may have been written to."""
        version = _version(self.objects[place])
        return isinstance(self.objects[place], torch.Tensor) and (version is None or version != self._versions[place])


def pack(value: Any, known: Known, what: str) -> tuple[tuple[list[TensorLayout], bytes], list[torch.Tensor]]:
    """Take a value apart, which is called `what` in an error.

    Returns:
        The layout of each tensor and the pickle of everything else; each tensor once, without gaps in memory.

    Raises:
        PipeboostError: something in it cannot be pickled.
    """
    file = io.BytesIO()
    packer = _Packer(file, known)
    try:
        packer.dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
        raise PipeboostError(f"{what} cannot be sent to other ranks ({error}); let every rank make its own") from error
    layouts = [TensorLayout(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in packer.tensors]
    return (layouts, file.getvalue()), packer.tensors


def unpack(content: bytes, tensors: Sequence[torch.Tensor], known: Known, device: torch.device) -> Any:
    """Return the value that was packed, made of the tensors that have arrived and of this rank's own objects.

    A `torch.device`, also that of a generator, is this rank's `device` where it is one of its type.
    """
    return _Unpacker(io.BytesIO(content), tensors, known, device).load()


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor without gaps as they lie in memory: a view, whatever the order of its dimensions."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, known: Known) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._known = known
        self._places: dict[int, tuple[int, torch.Tensor]] = {}  # with the tensor, which keeps its `id`

    def persistent_id(self, obj: Any) -> Any:
        place = self._known.place(obj)
        if place is not None:
            return ("known", place, self._place(obj) if self._known.changed(place) else None)
        if isinstance(obj, torch.Tensor):
            return ("tensor", self._place(obj))
        return ("device", obj.type) if isinstance(obj, torch.device) else None

    def _place(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._places:
            self._places[id(tensor)] = (len(self.tensors), tensor)
            self.tensors.append(_without_gaps(tensor))
        return self._places[id(tensor)][0]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor], known: Known, device: torch.device) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._known = known
        self._device = device

    def persistent_load(self, pid: Any) -> Any:
        how, place, *rest = pid
        if how == "tensor":
            return self._tensors[place]
        if how == "device":
            return self._device if place == self._device.type else torch.device(place)
        own = self._known.objects[place]
        if rest[0] is not None:
            with torch.no_grad():
                own.copy_(self._tensors[rest[0]])
        return own


def _without_gaps(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided:
        raise TypeError(f"a tensor of layout {tensor.layout}")
    plain = tensor.detach().resolve_conj().resolve_neg()
    dense: Callable[[torch.Tensor], int] = torch._debug_has_internal_overlap  # 0: neither gaps nor overlaps
    return plain if dense(plain) == 0 else plain.contiguous()


def _version(obj: Any) -> int | None:
    return obj._version if isinstance(obj, torch.Tensor) and not obj.is_inference() else None
