"""What the ranks run in `test_groups`."""

from typing import Any

import torch

from pipeboost.distributed import SEQUENCE, Mesh


def collectives(degrees: dict[str, int]) -> dict[str, Any]:
    """Each collective of a sequence group, on data that says where it came from."""
    mesh = Mesh(degrees, device=torch.device("cpu"))
    try:
        group = mesh.group(*SEQUENCE)
        sizes = [rank + 2 for rank in range(group.size)]
        own = torch.full((1, sizes[group.rank], 2), float(group.rank))
        sent = [group.rank + 1] * group.size
        received = [rank + 1 for rank in range(group.size)]
        parcel = torch.arange(sum(sent), dtype=torch.float32) + 100 * group.rank
        incoming = torch.empty(3)
        group.shift([torch.full((3,), float(group.rank))], [incoming]).wait()
        announced = torch.full((2,), float(group.rank))
        group.broadcast(announced, group.size - 1)
        return {
            "rank": group.rank,
            "sum": group.all_reduce(torch.tensor([float(group.rank), 1.0])),
            "gathered": group.all_gather(own, 1, sizes),
            "parcels": group.all_to_all(parcel, sent, received),
            "incoming": incoming,
            "announced": announced,
            "objects": mesh.control.all_gather_objects({"rank": group.rank, "text": "x" * group.rank}),
        }
    finally:
        mesh.close()


def places(degrees: dict[str, int]) -> dict[str, Any]:
    """Where each rank stands, and with whom."""
    mesh = Mesh(degrees, device=torch.device("cpu"))
    try:
        axes = ("cfg", "ring", "ulysses", "tensor")
        return {axis: (mesh.index(axis), mesh.group(axis).ranks) for axis in axes} | {
            "sequence": mesh.group(*SEQUENCE).ranks,
            "main": mesh.main,
        }
    finally:
        mesh.close()


def coming_alone() -> str:
    """A mesh that the other rank does not come to, and one that it does."""
    from pipeboost.core.errors import PipeboostError
    from pipeboost.distributed import start, world

    before, start.patience = start.patience, lambda: 1.0
    told = ""
    try:
        if world().rank == 0:
            Mesh({"ulysses": 2}, device=torch.device("cpu"))
    except PipeboostError as error:
        told = str(error)
    finally:
        start.patience = before
    return told
