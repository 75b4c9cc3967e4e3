"""Shards: which tokens are a rank's own. Image and text are each cut into runs of equal length, give or take one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from pipeboost.contract.call import Slot
from pipeboost.core.sharding import TokenArgument


def sizes(tokens: int, ranks: int) -> list[int]:
    """Return how many of `tokens` each rank has; the first ones have one more where they cannot be equal."""
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


@dataclass
class Shards:
    """How one forward's tokens are shared.

    Attributes:
        ranks: how many share them.
        rank: this one.
        image: tokens of the image, of all ranks.
        text: tokens of the text, of all ranks.
    """

    ranks: int
    rank: int
    image: int = 0
    text: int = 0
    _own: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def joint_sizes(self) -> list[int]:
        """How many tokens of image and text each rank has."""
        image, text = sizes(self.image, self.ranks), sizes(self.text, self.ranks)
        return [sum(own) for own in zip(image, text, strict=True)]

    def own(self, value: Any, argument: TokenArgument) -> Any:
        """Return this rank's tokens of a tensor, or of each in a tuple or list.

        Asked again for the same tensor it gives the same answer, and its own answers are taken for what they are.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self.own(item, argument) for item in value)
        if not isinstance(value, torch.Tensor) or (argument.ndim is not None and value.ndim != argument.ndim):
            return value
        known = self._own.get(id(value))
        if known is None:
            own = self._cut(value, argument)
            known = self._own[id(value)] = (value, own)
            self._own[id(own)] = (own, own)
        return known[1]

    def has(self, value: Any) -> bool:
        """Whether a tensor is one of this rank's own already."""
        known = self._own.get(id(value))
        return known is not None and known[1] is value

    def leading(self, tokens: int) -> int:
        """Return how many of the first `tokens` of the image are this rank's."""
        share = sizes(self.image, self.ranks)
        start = sum(share[: self.rank])
        return min(max(tokens - start, 0), share[self.rank])

    def _cut(self, value: torch.Tensor, argument: TokenArgument) -> torch.Tensor:
        if argument.tokens in ("image", "text"):
            return self._run(value, argument.dim)
        lengths = {"image": self.image, "text": self.text}
        order = argument.tokens.split("_")
        parts = value.split([lengths[name] for name in order], dim=argument.dim)
        return torch.cat([self._run(part, argument.dim) for part in parts], dim=argument.dim)

    def _run(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        share = sizes(value.shape[dim], self.ranks)
        return value.narrow(dim, sum(share[: self.rank]), share[self.rank]).contiguous()


SHARDS = Slot[Shards]()
"""Those of the forward that runs."""
