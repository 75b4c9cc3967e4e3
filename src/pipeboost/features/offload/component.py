"""One component that waits on the host: its weights come to the device when one of its methods is called.

Inside a session (a pipeline's call) they stay until another stage's component comes, or the session ends. Outside one
they stay for as long as that method runs.

What is changed in place on the device is written back when the weights leave it, as torch's version counters tell. A
change that goes around the counters (`weight.data += …`, as when a LoRA is fused) is kept if it is made between calls;
made by a step callback it is lost with the loaded weights, or reaches a streamed block one step late.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipeboost.contract.call import Slot, current_call
from pipeboost.features.offload.copy_stream import Arrival, CopyStream
from pipeboost.features.offload.host import HostStore
from pipeboost.features.offload.stream import BlockStream, tensors_of

LOADS = Slot[list[tuple[str, int, float]]](list)
"""Component, bytes and seconds of each load."""


class StagedComponent:
    """The weights of one module, on the host and, when needed, on the device.

    Attributes:
        path: the pipeline's attribute that held it when it was placed.
        lock: held by whoever uses it, for the length of a session or of one method.
        session: the session it is in.
        home: where most of its weights were when it was placed, and what is added goes when they are released.
    """

    def __init__(
        self, path: str, module: nn.Module, copies: CopyStream, stage: StagePart, blocks: Sequence[nn.Module]
    ) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.session: Session | None = None
        self.stage = stage
        self._module = weakref.ref(module)
        self._copies = copies
        self._store = HostStore(copies.device)
        self._stream = BlockStream(blocks, copies)
        self.home: torch.device | None = None
        self._depth = 0
        self._buffers: list[torch.Tensor] | None = None
        self._arrival: Arrival | None = None

    @property
    def loaded(self) -> bool:
        """Whether its weights are on the device; of a streamed one, all but its blocks'."""
        return self._buffers is not None

    @property
    def busy(self) -> bool:
        """Whether one of its methods runs now."""
        return self._depth > 0

    def bring_to_host(self) -> None:
        """Bring to the host what is not there: everything at first, later what the user added, moved or replaced."""
        module = self._module()
        if module is None:
            return
        inside = {id(part) for block in self._stream.blocks() for part in block.modules()}
        outer = [part for part in module.modules() if id(part) not in inside]
        rest = {id(tensor): tensor for part in outer for tensor in tensors_of(part, recurse=False)}
        # What two blocks share cannot come and go with each, so it stays with the rest.
        rest |= self._stream.shared()
        home = self.home
        if home is None:
            self.home = next((tensor.device for tensor in tensors_of(module)), torch.device("cpu"))
        with torch.inference_mode(False):
            self._store.adopt(rest.values(), home)
            self._stream.adopt(rest.keys(), home)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the weights are on the device."""
        with self.lock:
            self._depth += 1
            try:
                if not self.loaded:
                    if self.session is not None:
                        self.session.make_room(self)
                    self._load()
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self.session is None:
                    self.unload()

    def unload(self) -> None:
        """Take the weights off the device. Nothing is copied back but what was changed there."""
        if self._buffers is None:
            return
        call, arrival = current_call(), self._arrival
        seconds = arrival.finish() if arrival is not None else 0.0
        moved = sum(buffer.numel() for buffer in self._buffers) + self._stream.moved
        with torch.inference_mode(False):
            all_back = self._store.unload(self._buffers)
            self._buffers = self._arrival = None
            self._stream.close()
        if call is not None:
            call[LOADS].append((self.path, moved, seconds))
        if not all_back:
            self.bring_to_host()

    def release(self, home: torch.device | None = None) -> None:
        """Give the weights memory of their own again, where they came from or at `home`."""
        with self.lock, torch.inference_mode(False):
            self.unload()
            self._store.release(home)
            self._stream.release(home)

    def _load(self) -> None:
        self.bring_to_host()
        hosts = [chunk.host for chunk in self._store.chunks]
        # Nothing is pointed at the device before all of it is allocated: running out of memory changes nothing.
        buffers = [self._copies.empty(host.numel()) for host in hosts]
        self._stream.open()
        self._arrival = self._copies.send(zip(buffers, hosts, strict=True))
        self._arrival.wait()
        self._buffers = buffers
        with torch.inference_mode(False):
            self._store.load(buffers)

    def run(self, call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one method of the module with its weights on the device: the middleware on each of `METHODS`."""
        with self.entered():
            device = self._copies.device
            return call_next(*_on(device, args), **_on(device, kwargs))

    def run_block(self, index: int, call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a streamed block with its weights on the device: the middleware on its call."""
        with self.entered(), self._stream.holding(index):
            return call_next(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> StagedComponent:
        return self


class StagePart(NamedTuple):
    """When a component is used, which says what need not be on the device with it.

    Attributes:
        name: components of one stage stay together on the device.
        part: unless both name a part of the stage, and not the same one, as two experts do.
    """

    name: str
    part: str | None = None

    def overlaps(self, other: StagePart) -> bool:
        """Whether the two may be needed at once."""
        return self.name == other.name and (None in (self.part, other.part) or self.part == other.part)


class Session:
    """The length of a call, in which a component that was loaded stays for as long as its stage lasts."""

    def __init__(self, components: Sequence[StagedComponent]) -> None:
        self._components = components

    def make_room(self, arriving: StagedComponent) -> None:
        """Take off the device what belongs to another stage."""
        for component in self._components:
            if not component.busy and not component.stage.overlaps(arriving.stage):
                component.unload()

    def end(self) -> None:
        """Take everything off the device."""
        for component in self._components:
            if not component.busy:
                component.unload()


def _on(device: torch.device, value: Any) -> Any:
    """Move inputs to the device: a script that asks a waiting component for its device gets the host's."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device) if tensor.device != device and tensor.ndim else tensor

    return pytree.tree_map_only(torch.Tensor, moved, value)
