"""Residency: which component waits on the host, and when its weights are on the device."""

from pipeboost.features.offload.budget import bytes_on, kind_of, predict, weigh
from pipeboost.features.offload.choice import choose_policies, describe_memory, in_gib
from pipeboost.features.offload.place import (
    Placement,
    execution_device,
    place,
    placed_components,
    residing,
    stock_offload,
    unmovable_weights,
)

__all__ = [
    "Placement",
    "bytes_on",
    "choose_policies",
    "describe_memory",
    "execution_device",
    "in_gib",
    "kind_of",
    "place",
    "placed_components",
    "predict",
    "residing",
    "stock_offload",
    "unmovable_weights",
    "weigh",
]
