"""The table of attention kernels: where each runs, what it accepts, and what it needs installed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeboost.core.hardware import Hardware
from pipeboost.kernels.flash import flash2, flash3, flash3_fp8, flash4
from pipeboost.kernels.flex import flex
from pipeboost.kernels.key_padding import MaskKind
from pipeboost.kernels.sage import sage
from pipeboost.kernels.torch_native import Attended, cudnn, sdpa

_MASK_ORDER: tuple[MaskKind, ...] = ("none", "key padding", "any")


@dataclass(frozen=True)
class Package:
    """A package that provides a kernel.

    Attributes:
        module: what is imported.
        install: the command that installs it.
        dtypes: what its builds compute in, where that is less than the kernel's dtypes.
    """

    module: str
    install: str
    dtypes: tuple[torch.dtype, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One attention kernel.

    Attributes:
        name: by which the user asks for it.
        function: `(q, k, v, mask, return_lse, *, scale, right_padded)` with q, k and v of shape
            `(batch, tokens, heads, head_dim)`; returns the output of the queries' shape and dtype, with `return_lse`
            also the natural log-sum-exp, float32 `(batch, heads, tokens)`, which ring attention needs.
        head_dims: smallest and largest head dimension, and what it must be a multiple of.
        tier: the quality tier from which it may run.
        from_capability: the smallest CUDA compute capability.
        below_capability: the first one too large; None: no end.
        devices: device types.
        dtypes: dtypes of queries, keys and values.
        masks: the most that it honours.
        packages: any one of them will do; the first that is installed is used.
    """

    name: str
    function: Callable[..., Attended]
    head_dims: tuple[int, int, int]
    tier: str = "lossless"
    from_capability: tuple[int, int] = (8, 0)
    below_capability: tuple[int, int] | None = None
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    masks: MaskKind = "key padding"
    packages: tuple[Package, ...] = ()


_ANYWHERE: dict[str, Any] = {"devices": ("cpu", "cuda"), "dtypes": (torch.float32, torch.bfloat16, torch.float16)}
_FLASH_2 = (Package("flash_attn.flash_attn_interface", "pip install flash-attn --no-build-isolation"),)
_FLASH_3: dict[str, Any] = {
    "from_capability": (9, 0),
    "below_capability": (10, 0),
    "packages": (
        Package("flash_attn_interface", "pip install . (in flash-attention/hopper)"),
        Package("fa3_fwd_interface", "pip install fa3-fwd", dtypes=(torch.bfloat16,)),
    ),
}
_FLASH_4 = (Package("flash_attn.cute", "pip install --pre flash-attn-4"),)
_SAGE = (Package("sageattention", "pip install sageattention"),)

KERNELS: Mapping[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(name="sdpa", function=sdpa, head_dims=(1, 1024, 1), from_capability=(0, 0), masks="any", **_ANYWHERE),
        Kernel(name="cudnn", function=cudnn, head_dims=(8, 128, 8), masks="any"),
        Kernel(name="flash2", function=flash2, head_dims=(8, 256, 8), packages=_FLASH_2),
        Kernel(name="flash3", function=flash3, head_dims=(8, 256, 8), **_FLASH_3),
        Kernel(name="flash3_fp8", function=flash3_fp8, head_dims=(16, 256, 16), tier="balanced", **_FLASH_3),
        Kernel(name="flash4", function=flash4, head_dims=(64, 128, 32), from_capability=(10, 0), packages=_FLASH_4),
        Kernel(name="sage", function=sage, head_dims=(64, 128, 64), tier="balanced", packages=_SAGE),
        Kernel(name="flex", function=flex, head_dims=(16, 256, 1), from_capability=(7, 5), **_ANYWHERE),
    )
}


def wrong_hardware(kernel: Kernel, hardware: Hardware) -> str | None:
    """Return why a kernel is not for this hardware; None if it is."""
    if hardware.device not in kernel.devices:
        return f"it runs on {' or '.join(kernel.devices)} only, and this is {hardware}"
    lowest, end = kernel.from_capability, kernel.below_capability
    if hardware.capability is None or (lowest <= hardware.capability and (end is None or hardware.capability < end)):
        return None
    below = "" if end is None else f" and below {end[0]}.{end[1]}"
    return f"it needs compute capability {lowest[0]}.{lowest[1]} or more{below}, and this is {hardware}"


def missing_package(kernel: Kernel) -> str | None:
    """Return which package a kernel lacks, with the command that installs it; None if it lacks none."""
    if not kernel.packages or installed_package(kernel) is not None:
        return None
    return f"it needs a package: {' or '.join(f'`{package.install}`' for package in kernel.packages)}"


def unavailable_reason(kernel: Kernel, hardware: Hardware) -> str | None:
    """Return why a kernel cannot run on this machine, in one sentence with the way out; None if it can."""
    reason = wrong_hardware(kernel, hardware) or missing_package(kernel)
    return None if reason is None else f"attention={kernel.name!r} cannot run here: {reason}; or use 'auto' or 'sdpa'"


def available_kernels(hardware: Hardware) -> Mapping[str, Kernel]:
    """Return the kernels that can run on this machine, as they are installed here."""
    return {
        name: as_installed(kernel) for name, kernel in KERNELS.items() if unavailable_reason(kernel, hardware) is None
    }


def installed_package(kernel: Kernel) -> Package | None:
    """Return the package that serves a kernel here, found without importing it."""
    return next((package for package in kernel.packages if _is_installed(package.module)), None)


def as_installed(kernel: Kernel) -> Kernel:
    """Return a kernel with the dtypes that it computes in here, with the package that is installed."""
    package = installed_package(kernel)
    return kernel if package is None or package.dtypes is None else replace(kernel, dtypes=package.dtypes)


def refuses(kernel: Kernel, *, device: str, dtype: torch.dtype, head_dim: int, mask: MaskKind) -> str | None:
    """Return why a kernel will not take a call; None if it takes it. torch.compile can trace it.

    Args:
        kernel: the kernel, as it is installed.
        device: device type of the tensors.
        dtype: their dtype.
        head_dim: width of one head.
        mask: the kind of mask.
    """
    smallest, largest, multiple = kernel.head_dims
    if device not in kernel.devices:
        return "it does not run on this device"
    if dtype not in kernel.dtypes:
        return "it does not compute in this dtype"
    if not smallest <= head_dim <= largest or head_dim % multiple != 0:
        return "it does not have this head dimension"
    if _MASK_ORDER.index(mask) > _MASK_ORDER.index(kernel.masks):
        return "it does not honour this mask"
    return None


def _is_installed(module: str) -> bool:
    """Whether a module can be found, without importing any part of its package."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)
    for part in rest:
        if spec is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
    return spec is not None
