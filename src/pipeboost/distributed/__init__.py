"""Ranks: joining them, the mesh that orders them, and what they say to each other."""

from pipeboost.distributed.agreement import DisagreementError, agreed_arguments, checked_latents
from pipeboost.distributed.groups import Group, Pending
from pipeboost.distributed.meeting import decline, meet
from pipeboost.distributed.mesh import AXES, SAMPLE, SEQUENCE, Mesh
from pipeboost.distributed.peers import Peers
from pipeboost.distributed.sharing import shared
from pipeboost.distributed.start import World, local_device, world, world_size
from pipeboost.distributed.waiting import busy, follow
from pipeboost.distributed.watch import raise_if_failed, tell_stage, watched

__all__ = [
    "AXES",
    "SAMPLE",
    "SEQUENCE",
    "DisagreementError",
    "Group",
    "Mesh",
    "Peers",
    "Pending",
    "World",
    "agreed_arguments",
    "busy",
    "checked_latents",
    "decline",
    "follow",
    "local_device",
    "meet",
    "raise_if_failed",
    "shared",
    "tell_stage",
    "watched",
    "world",
    "world_size",
]
