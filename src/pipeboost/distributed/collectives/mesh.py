"""`Mesh`: the ranks of one pipeline in a grid, and this process's place in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from pipeboost.distributed.collectives.groups import Group
from pipeboost.distributed.failure.watchdog import Watchdog
from pipeboost.distributed.start import rendezvous, world

AXES = ("replicas", "cfg", "ring", "ulysses", "tensor")
"""Outermost first: tensor ranks, which communicate most, are adjacent."""
SEQUENCE = ("ring", "ulysses")
"""The axes that split the tokens; the shards are in the order of their product."""
FORWARD = ("ring", "ulysses", "tensor")
"""The axes whose ranks compute one forward of the denoiser together."""
SAMPLE = ("cfg", "ring", "ulysses", "tensor")
"""The axes whose ranks work on one sample together."""


class Mesh:
    """The ranks of one pipeline in a grid with the axes `AXES`. Several meshes may share ranks.

    Every rank of `ranks` makes it at the same point of its program.

    Args:
        degrees: how many ranks along each axis; 1 where not named.
        ranks: of the world; their number is the product of the degrees. None for the whole world.
        device: where the tensors are.

    Attributes:
        compared: sizes of latents that the ranks have compared after a first step.
        groups: every group of this rank, each once.
        control, forward: groups of CPU tensors, of the ranks of one sample and of one forward.
        watchdog: watches the calls of the ranks of one sample.

    Raises:
        PipeboostError: some ranks did not come.
    """

    def __init__(self, degrees: Mapping[str, int], *, ranks: Sequence[int] | None = None, device: torch.device) -> None:
        self.shape = tuple(degrees.get(axis, 1) for axis in AXES)
        everyone = world()
        self.ranks = tuple(range(everyone.size)) if ranks is None else tuple(ranks)
        self.device = device
        self.compared: set[torch.Size] = set()
        assert math.prod(self.shape) == len(self.ranks), "the product of the degrees is the number of ranks"
        self._grid = torch.tensor(self.ranks).reshape(self.shape)
        here = (self._grid == everyone.rank).nonzero()[0].tolist()
        self._here = dict(zip(AXES, here, strict=True))
        rendezvous("a mesh", self.ranks, "ready")
        self.groups: list[Group] = []
        self._groups: dict[tuple[str, ...], Group] = {}
        try:
            for axes in (*((axis,) for axis in AXES), SEQUENCE, SAMPLE):
                members = self._members(axes)
                known = next((group for group in self.groups if group.ranks == members), None)
                self._groups[axes] = known or self._new_group(members, device.type)
            # For objects and small facts, which must not wait for the GPU.
            self.control = self._new_group(self._members(SAMPLE), "cpu")
            self.forward = self._new_group(self._members(FORWARD), "cpu")
            self.watchdog = Watchdog(self.control, self.groups, device)
        except BaseException:
            for group in self.groups:
                group.close()
            raise

    def _new_group(self, members: tuple[int, ...], device: str) -> Group:
        self.groups.append(Group(members, device))
        return self.groups[-1]

    def group(self, *axes: str) -> Group:
        """Return the ranks that differ from this one along these axes alone: one axis, `SEQUENCE` or `SAMPLE`."""
        return self._groups[axes]

    def degree(self, axis: str) -> int:
        """Return how many ranks there are along an axis."""
        return self.shape[AXES.index(axis)]

    def index(self, axis: str) -> int:
        """Return this process's place along an axis."""
        return self._here[axis]

    @property
    def main(self) -> bool:
        """Whether this is the first of the ranks that work on its sample."""
        return self.control.rank == 0

    def close(self) -> None:
        """Give up all groups. Every rank of the mesh does so."""
        for group in self.groups:
            group.close()
        self.watchdog.close()

    def _members(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        index = tuple(slice(None) if axis in axes else self._here[axis] for axis in AXES)
        return tuple(self._grid[index].flatten().tolist())
