"""Ranks: joining them, the mesh that orders them, and what they agree on; below, what other rooms use of it."""

# ruff: noqa: F401

from pipeboost.distributed.agreement.arguments import (
    DisagreementError,
    agreed_arguments,
    checked_latents,
    require_same_state,
)
from pipeboost.distributed.agreement.broadcast import broadcast_outcome
from pipeboost.distributed.collectives.groups import Group
from pipeboost.distributed.collectives.mesh import AXES, SAMPLE, SEQUENCE, Mesh
from pipeboost.distributed.collectives.symmetric_buffers import Peers
from pipeboost.distributed.failure.collective_wait import finish, suspend_timeout
from pipeboost.distributed.start import announce, decline, local_device, rendezvous, world, world_size
