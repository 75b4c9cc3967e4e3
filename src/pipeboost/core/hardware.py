"""What this machine is: device, capability, memory and links. Works on CPU and on CUDA."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch

from pipeboost.core.errors import ConfigurationError, UnsupportedError, not_one_of
from pipeboost.core.obstacles import hooks_in, modules_of
from pipeboost.core.seams import middleware_of


@dataclass(frozen=True)
class Hardware:
    """One device and what surrounds it.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        name: what the device calls itself.
        capability: CUDA compute capability, such as `(9, 0)`; None on CPU.
        memory: bytes of the device's memory (of the machine's on CPU).
        count: devices of this kind in the machine.
        peer_links: whether every pair of these devices can reach each other's memory directly.
        compiler: whether torch.compile's default backend can build here (on CPU it needs a C++ compiler).
    """

    device: str
    name: str
    capability: tuple[int, int] | None
    memory: int
    count: int
    peer_links: bool
    compiler: bool

    def __str__(self) -> str:
        capability = f", capability {self.capability[0]}.{self.capability[1]}" if self.capability else ""
        several = f"{self.count} x " if self.count > 1 else ""
        return f"{several}{self.name} ({self.memory / 2**30:.0f} GiB{capability})"


def detect_hardware(device: str | torch.device | None = None) -> Hardware:
    """Describe a device: the given one, else the current CUDA device where there is one, else the CPU.

    Raises:
        UnsupportedError: a device that is neither a CPU nor one of CUDA.
    """
    chosen = torch.device(device_type("auto") if device is None else device)
    if chosen.type == "cuda":
        index = chosen.index if chosen.index is not None else torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        count = torch.cuda.device_count()
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        return Hardware(
            device="cuda",
            name=properties.name,
            capability=(properties.major, properties.minor),
            memory=properties.total_memory,
            count=count,
            peer_links=bool(pairs) and all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs),
            compiler=importlib.util.find_spec("triton") is not None,
        )
    if chosen.type != "cpu":
        raise UnsupportedError(f"pipeboost runs on cpu and cuda devices, not on {chosen.type!r}; use pipe.to('cuda')")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return Hardware("cpu", f"CPU with {os.cpu_count()} cores", None, memory, 1, False, compiler)


def free_memory(device: torch.device) -> int:
    """Return the bytes that torch here could still allocate on a device; on a CPU, the memory of the machine.

    It counts what torch's allocator keeps cached, and obeys `torch.cuda.set_per_process_memory_fraction`.
    """
    if device.type != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + torch.cuda.memory_reserved(device), allowed) - allocated)


def has_cuda() -> bool:
    """Whether this torch can use a CUDA device."""
    return torch.cuda.is_available()


def device_type(name: str) -> str:
    """Return `"cpu"` or `"cuda"`: what a user named, or for `"auto"` what is here.

    Raises:
        ConfigurationError: another name, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise not_one_of("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not has_cuda():
        raise ConfigurationError("device='cuda': this torch sees no CUDA device; use device='cpu'")
    return name if name != "auto" else "cuda" if has_cuda() else "cpu"


def device_of(pipe: Any) -> torch.device:
    """Return where a pipeline's script runs: what its `_execution_device` says.

    Where no hook moves weights about, that is where they are; asking the property walks all modules several times over.
    Where some are on a GPU, the others wait on the host for their turn.
    """
    components = _modules_of(pipe)
    moved = middleware_of(pipe, "_execution_device") or any(map(hooks_in, components))
    return (None if moved else _where_they_run(components)) or pipe._execution_device


def device_of_weights(pipe: Any) -> torch.device | None:
    """Return the one device that components' weights are on, besides the host where some may wait; None for several."""
    return _where_they_run(_modules_of(pipe))


def _modules_of(pipe: Any) -> list[torch.nn.Module]:
    return [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]


def _where_they_run(components: list[torch.nn.Module]) -> torch.device | None:
    devices: set[torch.device] = set()
    for component in components:
        weights = [w for part in modules_of(component) for w in part._parameters.values() if w is not None]
        devices |= {weight.device for weight in weights[:1]}
    candidates = devices if len(devices) == 1 else {device for device in devices if device.type != "cpu"}
    return next(iter(candidates)) if len(candidates) == 1 else None
