"""`Strip`: a rank's part of the map that a VAE's encoder or decoder works on, and what it needs of the other ranks."""

from __future__ import annotations

from functools import cached_property

import torch

from pipeboost.distributed import Group
from pipeboost.features.parallel.shards import sizes


class Strip:
    """How the ranks of a group share a map, all along one dimension, and this rank's place.

    A row is the smallest piece that is shared: one of the latent map, which is several pixels.

    Args:
        group: the ranks.
        dim: -2 where each has some rows of the map, -1 where each has some columns; both are called rows here.
        rows: of all ranks.
        breadth: extent of the latent map along the other dimension.
        device: where the map is.
    """

    def __init__(self, group: Group, *, dim: int, rows: int, breadth: int, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.dim = dim
        self.rows = sizes(rows, group.size)
        self.breadth = breadth

    @property
    def own_rows(self) -> int:
        """How many rows this rank has."""
        return self.rows[self.group.rank]

    @cached_property
    def shares(self) -> torch.Tensor:
        """The part of the map that each rank has, `(ranks,)`, float64."""
        return torch.tensor(self.rows, dtype=torch.float64, device=self.device) / sum(self.rows)

    def extents(self, own: int) -> list[int]:
        """Return how much each rank has of what this one has `own` of: pixels along `dim`, or tokens."""
        scale, rest = divmod(own, self.own_rows)
        assert rest == 0, f"{own} does not consist of {self.own_rows} equal parts"
        return [scale * rows for rows in self.rows]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a map that all ranks have."""
        scale = whole.shape[self.dim] // sum(self.rows)
        start = sum(self.rows[: self.group.rank])
        return whole.narrow(self.dim, scale * start, scale * self.own_rows).contiguous()

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return the whole map, on all ranks."""
        return self.group.all_gather(own, own.ndim + self.dim, self.extents(own.shape[self.dim]))

    def fill_borders(self, padded: torch.Tensor, *, before: int, after: int, above: int, below: int) -> None:
        """Write the nearest pixels of the adjacent strips over this one's padding, which stays at the edges of the map.

        Args:
            padded: this rank's pixels with padding.
            before: pixels of padding before its own along `dim`, of which the last `above` are wanted.
            after: the same behind its own, of which the first `below` are wanted.
        """
        own = padded.shape[self.dim] - before - after
        self.extents(own)
        previous, following = self.group.rank - 1, self.group.rank + 1
        sent, received, borders = [], [], []
        for rank, count, start, wanted, place in (
            (previous, below, before, above, before - above),
            (following, above, before + own - above, below, before + own),
        ):
            if 0 <= rank < self.group.size and count:
                sent.append((padded.narrow(self.dim, start, count).contiguous(), rank))
            if 0 <= rank < self.group.size and wanted:
                borders.append(padded.narrow(self.dim, place, wanted))
                received.append((torch.empty_like(borders[-1], memory_format=torch.contiguous_format), rank))
        self.group.exchange(sent, received).wait()
        for border, (pixels, _) in zip(borders, received, strict=True):
            border.copy_(pixels)
