"""Ranks: joining them, the mesh that orders them, and what they say to each other."""

from pipeboost.distributed.agreement import DisagreementError, agreed_arguments, checked_latents
from pipeboost.distributed.groups import Group, Pending, group_named
from pipeboost.distributed.mesh import AXES, SAMPLE, SEQUENCE, Mesh
from pipeboost.distributed.sharing import shared
from pipeboost.distributed.start import World, local_device, world, world_size

__all__ = [
    "AXES",
    "SAMPLE",
    "SEQUENCE",
    "DisagreementError",
    "Group",
    "Mesh",
    "Pending",
    "World",
    "agreed_arguments",
    "checked_latents",
    "group_named",
    "local_device",
    "shared",
    "world",
    "world_size",
]
