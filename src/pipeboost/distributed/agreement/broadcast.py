"""`broadcast_outcome`: work that some ranks of a sample do, and all of them have the outcome of.

Any value can be one: its tensors travel by themselves, and a pickle of everything else.
"""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.collectives.mesh import SAMPLE, Mesh


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


def pack(
    value: Any, known: Sequence[Any], versions: Sequence[int | None], what: str
) -> tuple[tuple[list[TensorLayout], bytes], list[torch.Tensor]]:
    """Take a value apart, which is called `what` in an error; objects that are known had these versions before.

    Returns:
        The layout of each tensor and the pickle of everything else; each tensor once, without gaps in memory.

    Raises:
        PipeboostError: something in it cannot be pickled.
    """
    file = io.BytesIO()
    packer = _Packer(file, known, versions)
    try:
        packer.dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
        raise PipeboostError(f"{what} cannot be sent to other ranks ({error}); let every rank make its own") from error
    layouts = [TensorLayout(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in packer.tensors]
    return (layouts, file.getvalue()), packer.tensors


def unpack(content: bytes, tensors: Sequence[torch.Tensor], known: Sequence[Any], device: torch.device) -> Any:
    """Return the value that was packed, made of the tensors that have arrived and of this rank's own objects.

    A `torch.device`, also that of a generator, is this rank's `device` where it is one of its type.
    """
    return _Unpacker(io.BytesIO(content), tensors, known, device).load()


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, known: Sequence[Any], versions: Sequence[int | None]) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._known = {id(each): place for place, each in enumerate(known)}
        self._versions = versions
        self._places: dict[int, tuple[int, torch.Tensor]] = {}  # with the tensor, which keeps its `id`

    def persistent_id(self, obj: Any) -> Any:
        place = self._known.get(id(obj))
        if place is not None:
            version = _version(obj)
            changed = isinstance(obj, torch.Tensor) and (version is None or version != self._versions[place])
            return ("known", place, self._place(obj) if changed else None)
        if isinstance(obj, torch.Tensor):
            return ("tensor", self._place(obj))
        return ("device", obj.type) if isinstance(obj, torch.device) else None

    def _place(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._places:
            self._places[id(tensor)] = (len(self.tensors), tensor)
            self.tensors.append(_without_gaps(tensor))
        return self._places[id(tensor)][0]


class _Unpacker(pickle.Unpickler):
    def __init__(
        self, file: io.BytesIO, tensors: Sequence[torch.Tensor], known: Sequence[Any], device: torch.device
    ) -> None:
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
        own = self._known[place]
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


def broadcast_outcome(
    mesh: Mesh, work: Callable[[], Any], *, what: str, branch: int | None = None, known: Sequence[Any] = ()
) -> Any:
    """Return what `work()` returns on the ranks that do it, on all ranks of the sample. Every one of them calls this.

    Values go by the control group, tensors by that of their device. They arrive with the same dtype, shape and order in
    memory; a CUDA tensor arrives on this rank's device.

    Args:
        what: describes the outcome, for an error.
        branch: the ranks with this index along the cfg axis do it; None for the main rank alone.
        known: objects that each rank has of its own, in one order: parts of the outcome that are not sent. A tensor
            among them that `work` wrote to is brought up to date in place.

    Raises:
        Exception: what the work has raised, on every rank; where it cannot be pickled, a `PipeboostError` with its text
            in its place on the others.
        PipeboostError: the outcome has something that cannot be pickled; on every rank.
    """
    versions = [_version(each) for each in known]
    here = mesh.main if branch is None else mesh.index("cfg") == branch
    value, packed, error, failed = None, None, None, b""
    tensors: list[torch.Tensor] = []
    if here:
        try:
            value = work()
            packed, tensors = pack(value, known, versions, what)
        except Exception as failure:
            error, failed = failure, _packed_failure(failure, mesh.control.ranks[mesh.control.rank])
    everyone = mesh.control.all_gather_objects((packed, failed))
    if error is not None:
        raise error
    for _, failed in everyone:
        if failed:
            error, where = pickle.loads(failed)
            raise error from PipeboostError(where)  # the traceback there
    source = next(rank for rank, (sent, _) in enumerate(everyone) if sent is not None)
    layouts, content = everyone[source][0]
    assert packed is None or packed[0] == layouts, "the ranks of one branch have done the same"
    arrived = []
    for place, layout in enumerate(layouts):
        on_device = layout.device == mesh.device.type
        group, root = mesh.control, source
        if on_device:
            group, root = (mesh.group(*SAMPLE), 0) if branch is None else (mesh.group("cfg"), branch)
        sends = here and (on_device or mesh.control.rank == source)
        tensor = tensors[place] if sends else layout.empty(mesh.device)
        if tensor.numel():
            memory = tensor.as_strided((tensor.numel(),), (1,))  # as it lies there, in whatever order of dimensions
            group.broadcast(memory.view(torch.uint8), root)
        arrived.append(tensor)
    return value if here else unpack(content, arrived, known, mesh.device)


def _packed_failure(error: Exception, rank: int) -> bytes:
    """What `rank` of the world has raised, and its traceback, pickled."""
    where = f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        packed = pickle.dumps((error, where))
        pickle.loads(packed)
    # Exceptions take whatever arguments they like, and a pickle of one may fail in as many ways.
    except Exception:
        text = f"{type(error).__name__} on rank {rank}: {error}"
        packed = pickle.dumps((PipeboostError(text), where))
    return packed
