"""Which kernel a call gets: the user's, or the best one by hardware, token count and mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from pipeboost.config import AttentionConfig, tier_allows
from pipeboost.errors import ConfigurationError, MissingPackageError, UnsupportedError, not_one_of
from pipeboost.hardware import Hardware
from pipeboost.kernels import (
    KERNELS,
    Kernel,
    MaskKind,
    available_kernels,
    missing_package,
    refuses,
    unavailable_reason,
    wrong_hardware,
)

# On an H100 FlashAttention 3 is no faster than cuDNN at 4.6k tokens and 1.25-1.4x faster at 33k.
LARGE_TOKENS = 8192
_TOO_FEW = f"it gains nothing below {LARGE_TOKENS} queries and keys"
# Fastest first; whatever none of them takes is sdpa's.
_PREFERENCE = ("flash4", "flash3_fp8", "flash3", "flash2")


class KernelChoice(NamedTuple):
    """The kernel of one call, why, and what spoke against each faster one."""

    kernel: Kernel
    reason: str
    considered: tuple[tuple[str, str], ...]


def choose_kernel(
    q_tokens: int,
    kv_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    mask: MaskKind,
    hardware: Hardware,
    tier: str,
    installed: Mapping[str, tuple[torch.dtype, ...]],
) -> KernelChoice:
    """What `"auto"` runs; a pure function of its arguments, so that a plan can explain it.

    It is traced by torch.compile, where token counts may be symbols. They are only compared with `LARGE_TOKENS`, so a
    text length that varies costs no second graph unless it crosses that.

    Args:
        q_tokens: number of queries.
        kv_tokens: number of keys.
        head_dim: width of one head.
        dtype: of queries, keys and values.
        mask: the kind of mask.
        hardware: where it runs.
        tier: the quality tier.
        installed: what `available_kernels` says.
    """
    large = q_tokens >= LARGE_TOKENS and kv_tokens >= LARGE_TOKENS
    considered: list[tuple[str, str]] = []
    for name in _PREFERENCE:
        kernel = KERNELS[name]
        against: str | None = None
        if hardware.device not in kernel.devices:
            continue
        if not tier_allows(tier, kernel.tier):
            against = "it is lossier than the quality tier allows"
        elif name not in installed:
            against = "it is not installed, or not for this device"
        elif name == "flash2" and mask == "none":
            against = "sdpa holds the same kernel"
        elif not large:
            against = _TOO_FEW
        else:
            against = refuses(
                kernel, device=hardware.device, dtype=dtype, head_dim=head_dim, mask=mask, dtypes=installed[name]
            )
        if against is None:
            return KernelChoice(kernel, "the fastest for this many tokens", tuple(considered))
        considered.append((name, against))
    return KernelChoice(KERNELS["sdpa"], "torch picks the best of its own kernels", tuple(considered))


def check_choice(
    backend: str, *, tier: str, hardware: Hardware, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> None:
    """Refuse a backend that cannot run here, before anything is changed.

    Raises:
        ConfigurationError: no such backend, or the tier does not allow it.
        MissingPackageError: its package is not installed.
        UnsupportedError: this device, dtype or head dimension is not for it.
    """
    if backend == "auto":
        return
    if backend not in KERNELS:
        raise not_one_of("attention", backend, ("auto", *KERNELS))
    kernel = KERNELS[backend]
    if not tier_allows(tier, kernel.tier):
        raise ConfigurationError(
            f"attention={backend!r} is not allowed in quality={tier!r}; it needs quality={kernel.tier!r}"
        )
    unavailable = unavailable_reason(kernel, hardware)
    if unavailable is not None:
        raise (
            MissingPackageError(unavailable)
            if wrong_hardware(kernel, hardware) is None
            else UnsupportedError(unavailable)
        )
    against = refuses(
        kernel,
        device=hardware.device,
        dtype=kernel.dtypes[0] if dtype is None else dtype,
        head_dim=kernel.head_dims[1] if head_dim is None else head_dim,
        mask="none",
    )
    if against is not None:
        raise UnsupportedError(refusal(backend, against, f"dtype {dtype}, head dimension {head_dim}"))


def refusal(backend: str, against: str, call: str) -> str:
    """What to tell the user of a call that the kernel which they named does not take."""
    return f"attention={backend!r} cannot take this call ({call}): {against}; use 'auto' or 'sdpa'"


def explain_choice(
    settings: AttentionConfig, *, hardware: Hardware, tier: str, dtype: torch.dtype
) -> tuple[str, str, tuple[str, ...]]:
    """What a plan says of attention: the choice, why, and what was considered.

    Raises:
        ConfigurationError, MissingPackageError, UnsupportedError: the backend cannot run here.
    """
    check_choice(settings.backend, tier=tier, hardware=hardware, dtype=dtype)
    if settings.backend != "auto":
        return settings.backend, "asked for", ()
    installed = available_kernels(hardware)
    small = choose_kernel(LARGE_TOKENS - 1, LARGE_TOKENS - 1, 128, dtype, "none", hardware, tier, installed)
    large = choose_kernel(LARGE_TOKENS, LARGE_TOKENS, 128, dtype, "none", hardware, tier, installed)
    considered = tuple(
        f"{name}: {wrong_hardware(KERNELS[name], hardware) or missing_package(KERNELS[name]) or against}"
        for name, against in large.considered
    )
    if small.kernel is large.kernel:
        return large.kernel.name, large.reason, considered
    return (
        f"{large.kernel.name} from {LARGE_TOKENS} tokens, else {small.kernel.name}",
        f"{large.kernel.name} is {large.reason}; below, {small.reason}",
        considered,
    )
