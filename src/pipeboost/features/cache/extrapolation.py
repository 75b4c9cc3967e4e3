"""`OutputBranch`: a transformer's outputs in the steps that a mask skips, extrapolated from the computed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree


class _Known(NamedTuple):
    """What was known of a step: tensors and other leaves of what a transformer returned, and how they are nested."""

    step: int
    leaves: list[Any]
    nesting: Any


@dataclass
class OutputBranch:
    """What one guidance branch of one expert returned in its latest computed steps.

    Attributes:
        mask: 1 for each step of the expert that is computed.
        order: of the polynomial through the latest outputs; 0 repeats the last one.
        first: the branch that this one is guided against, where it may be gated.
        gate: the step from which on this branch is not computed: it is the first one, and what it last differed by.
        skipped: of each step so far, whether it was.
    """

    mask: list[int]
    order: int
    first: OutputBranch | None = None
    gate: int | None = None
    skipped: list[bool] = field(default_factory=list)
    _latest: list[_Known] = field(default_factory=list)
    _difference: _Known | None = None
    _given: list[Any] = field(default_factory=list)
    _samples: int | None = None

    def run(self, forward: Callable[[], Any], samples: int | None = None) -> Any:
        """Return what the transformer returns in the next step, computed or extrapolated.

        Args:
            forward: computes it.
            samples: that it is asked for; a step with another number than the one before is computed.
        """
        if samples != self._samples:
            self._samples, self._difference = samples, None
            self._latest.clear()
        # A guider may leave out this branch in some steps, but not the first one.
        step = len(self.skipped) if self.first is None else len(self.first.skipped) - 1
        gated = self._difference if self.gate is not None and step >= self.gate else None
        # A scheduler of higher order may ask for more forwards than the mask has steps: these are computed.
        skip = gated is not None or (step < len(self.mask) and not self.mask[step] and bool(self._latest))
        if gated is not None and self.first is not None:
            result = _shifted(self.first._given, gated)
        elif skip:
            result = self._extrapolated(step)
        else:
            result = forward()
            self._latest = [*self._latest, _Known(step, *pytree.tree_flatten(result))][-self.order - 1 :]
            if self.first is not None:
                self._difference = self._from(self.first._given)
        if self.gate is not None:
            self._given = pytree.tree_leaves(result)
        self.skipped.append(skip)
        return result

    def release(self) -> None:
        """Drop the outputs; the counts stay."""
        self._latest.clear()
        self._given.clear()
        self._difference = None

    def _extrapolated(self, step: int) -> Any:
        weights = lagrange_weights([known.step for known in self._latest], step)
        leaves = [
            _weighed(weights, outputs) if _is_float(outputs[-1]) else outputs[-1]
            for outputs in zip(*(known.leaves for known in self._latest), strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._latest[-1].nesting)

    def _from(self, theirs: list[Any]) -> _Known:
        """Return by what this branch's latest output differs from the first one's of this step."""
        own = self._latest[-1]
        leaves = [
            mine.to(_wide(mine)) - other if _is_float(mine) else mine
            for mine, other in zip(own.leaves, theirs, strict=True)
        ]
        return own._replace(leaves=leaves)


def _shifted(outputs: list[Any], difference: _Known) -> Any:
    leaves = [
        (output + apart).to(output.dtype) if _is_float(output) else apart
        for output, apart in zip(outputs, difference.leaves, strict=True)
    ]
    return pytree.tree_unflatten(leaves, difference.nesting)


def sample_elements(result: Any) -> int:
    """Return how many elements the first tensor that a transformer returned has for one sample."""
    first = next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
    return first.numel() // len(first)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _weighed(weights: list[float], outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    dtype, wide = outputs[0].dtype, _wide(outputs[0])
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
