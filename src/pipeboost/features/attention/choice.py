"""Which kernel a call gets: the user's, or the best one by hardware, token count and mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from pipeboost.contract.decision import needs_tier
from pipeboost.core.config import AttentionConfig, tier_allows
from pipeboost.core.errors import MissingPackageError, UnsupportedError, not_one_of
from pipeboost.core.hardware import Hardware
from pipeboost.kernels.key_padding import MaskKind
from pipeboost.kernels.table import (
    KERNELS,
    Kernel,
    as_installed,
    available_kernels,
    missing_package,
    refuses,
    unavailable_reason,
    wrong_hardware,
)

# Fastest first, with the fewest queries and keys from which each pays; whatever none of them takes is sdpa's. On an
# H100 FlashAttention 3 makes a whole forward 2% faster at 4.2k to 4.6k tokens (the kernel alone is 1.25-1.4x faster
# than cuDNN's at 33k); 8 bits gain nothing over it at 4.6k and 5% at 14k.
_PAYS_FROM: Mapping[str, int] = {"flash4": 4096, "flash3_fp8": 8192, "flash3": 4096, "flash2": 4096}


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
    installed: Mapping[str, Kernel],
) -> KernelChoice:
    """Choose what `"auto"` runs; a pure function of its arguments, so that a plan can explain it.

    It is traced by torch.compile, where token counts may be symbols. They are only compared with a few bounds, so a
    text length that varies costs no second graph unless it crosses one.

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
    considered: list[tuple[str, str]] = []
    for name, fewest in _PAYS_FROM.items():
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
        elif q_tokens < fewest or kv_tokens < fewest:
            against = f"it gains nothing below {fewest} queries and keys"
        else:
            kernel = installed[name]
            against = refuses(kernel, device=hardware.device, dtype=dtype, head_dim=head_dim, mask=mask)
        if against is None:
            return KernelChoice(kernel, "the fastest for this many tokens", tuple(considered))
        considered.append((name, against))
    return KernelChoice(KERNELS["sdpa"], "torch picks the best of its own kernels", tuple(considered))


def check_name(backend: str) -> None:
    """Raise unless a backend is one of the table.

    Raises:
        ConfigurationError: there is no such kernel.
    """
    if backend not in ("auto", *KERNELS):
        raise not_one_of("attention", backend, ("auto", *KERNELS))


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
    check_name(backend)
    kernel = KERNELS[backend]
    if not tier_allows(tier, kernel.tier):
        raise needs_tier("attention", backend, kernel.tier, tier)
    unavailable = unavailable_reason(kernel, hardware)
    if unavailable is not None:
        raise (UnsupportedError if wrong_hardware(kernel, hardware) else MissingPackageError)(unavailable)
    kernel = as_installed(kernel)
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
    """Return the sentence for a call that the kernel the user named does not take."""
    return f"attention={backend!r} cannot take this call ({call}): {against}; use 'auto' or 'sdpa'"


def explain_choice(
    settings: AttentionConfig, *, hardware: Hardware, tier: str, dtype: torch.dtype
) -> tuple[str, str, tuple[str, ...]]:
    """Return what a plan says of attention: the choice, why, and what was considered.

    Raises:
        ConfigurationError, MissingPackageError, UnsupportedError: the backend cannot run here.
    """
    check_choice(settings.backend, tier=tier, hardware=hardware, dtype=dtype)
    if settings.backend != "auto":
        return settings.backend, "asked for", ()
    installed = available_kernels(hardware)
    bounds = sorted({0, *_PAYS_FROM.values()}, reverse=True)
    choices = [choose_kernel(bound, bound, 128, dtype, "none", hardware, tier, installed) for bound in bounds]
    largest, smallest = choices[0], choices[-1]
    considered = tuple(
        f"{name}: {wrong_hardware(KERNELS[name], hardware) or missing_package(KERNELS[name]) or against}"
        for name, against in largest.considered
    )
    if smallest.kernel is largest.kernel:
        return largest.kernel.name, largest.reason, considered
    from_tokens = {choice.kernel.name: bound for choice, bound in zip(choices, bounds, strict=True)}
    del from_tokens[smallest.kernel.name]
    large = ", ".join(f"{name} from {bound} tokens" for name, bound in from_tokens.items())
    return (
        f"{large}, else {smallest.kernel.name}",
        f"{' and '.join(from_tokens)} {'is' if len(from_tokens) == 1 else 'are'} {largest.reason}; "
        f"below, {smallest.reason}",
        considered,
    )
