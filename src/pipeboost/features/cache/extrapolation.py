"""`OutputBranch`: a transformer's outputs in the steps that a mask skips, extrapolated from the computed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass
class OutputBranch:
    """What one guidance branch of one expert returned in its latest computed steps.

    Attributes:
        mask: 1 for each step of the expert that is computed.
        order: of the polynomial through the latest outputs; 0 repeats the last one.
        skipped: of each step so far, whether it was.
    """

    mask: list[int]
    order: int
    skipped: list[bool] = field(default_factory=list)
    _latest: list[tuple[int, list[Any], Any]] = field(default_factory=list)

    def run(self, forward: Callable[[], Any]) -> Any:
        """Return what the transformer returns in the next step, computed or extrapolated."""
        step = len(self.skipped)
        # A scheduler of higher order may ask for more forwards than the mask has steps: these are computed.
        skip = step < len(self.mask) and not self.mask[step] and bool(self._latest)
        result = self._extrapolated(step) if skip else forward()
        if not skip:
            self._latest = [*self._latest, (step, *pytree.tree_flatten(result))][-self.order - 1 :]
        self.skipped.append(skip)
        return result

    def release(self) -> None:
        """Drop the outputs; the counts stay."""
        self._latest.clear()

    def _extrapolated(self, step: int) -> Any:
        weights = lagrange_weights([known for known, _, _ in self._latest], step)
        leaves = []
        for outputs in zip(*(leaves for _, leaves, _ in self._latest), strict=True):
            if isinstance(outputs[-1], torch.Tensor) and outputs[-1].is_floating_point():
                leaves.append(_weighed(weights, outputs))
            else:
                leaves.append(outputs[-1])
        return pytree.tree_unflatten(leaves, self._latest[-1][2])


def _weighed(weights: list[float], outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    dtype = outputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = outputs[0].to(wide) * weights[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total.add(output.to(wide), alpha=weight)
    return total.to(dtype)


def lagrange_weights(known: list[int], step: int) -> list[float]:
    """Return what each known value counts in the polynomial through all of them, taken at `step`."""
    weights = []
    for here in known:
        weight = 1.0
        for other in known:
            if other != here:
                weight *= (step - other) / (here - other)
        weights.append(weight)
    return weights
