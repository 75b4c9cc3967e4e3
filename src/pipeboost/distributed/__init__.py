"""Ranks: joining them, the mesh that orders them, and what they say to each other."""

from pipeboost.distributed.agreement.arguments import (
    DisagreementError,
    agreed_arguments,
    checked_latents,
    require_same_state,
)
from pipeboost.distributed.agreement.broadcast import shared
from pipeboost.distributed.collectives.collective_wait import busy, follow
from pipeboost.distributed.collectives.groups import Group, Pending
from pipeboost.distributed.collectives.mesh import AXES, SAMPLE, SEQUENCE, Mesh
from pipeboost.distributed.collectives.symmetric_buffers import Peers
from pipeboost.distributed.failure.rendezvous import decline, meet
from pipeboost.distributed.failure.watch import raise_if_failed, tell_stage, watched
from pipeboost.distributed.start import World, local_device, world, world_size

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
    "require_same_state",
    "shared",
    "tell_stage",
    "watched",
    "world",
    "world_size",
]
