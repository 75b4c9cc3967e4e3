"""Attention kernels and the table of them; nothing that only a GPU has is imported before its first use."""

from pipeboost.kernels.key_padding import MaskKind, compact_keys, mask_kind
from pipeboost.kernels.merge import merge_partial
from pipeboost.kernels.table import (
    KERNELS,
    Kernel,
    accepted_dtypes,
    available_kernels,
    installed_package,
    missing_package,
    refuses,
    unavailable_reason,
    wrong_hardware,
)
from pipeboost.kernels.torch_native import Attended

__all__ = [
    "KERNELS",
    "Attended",
    "Kernel",
    "MaskKind",
    "accepted_dtypes",
    "available_kernels",
    "compact_keys",
    "installed_package",
    "mask_kind",
    "merge_partial",
    "missing_package",
    "refuses",
    "unavailable_reason",
    "wrong_hardware",
]
