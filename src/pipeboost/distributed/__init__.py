"""Ranks: joining them, the mesh that orders them, and what they say to each other."""

from pipeboost.distributed.groups import Group, Pending, group_named
from pipeboost.distributed.mesh import AXES, SAMPLE, SEQUENCE, Mesh
from pipeboost.distributed.start import World, local_device, world, world_size

__all__ = [
    "AXES",
    "SAMPLE",
    "SEQUENCE",
    "Group",
    "Mesh",
    "Pending",
    "World",
    "group_named",
    "local_device",
    "world",
    "world_size",
]
