"""Searches schedules over recorded trajectories, without running the model.

A skipped step adds an error to the latents: its weight times how far the extrapolated prediction is from the recorded
one. Errors of several steps add up as vectors. What later steps make of an error is not in a recording: it is measured
once, as a gain for each step (`gains`): early errors grow, for they change what the picture becomes; late ones fade.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeboost.features.cache.extrapolation import lagrange_weights

_QUANTILE = 0.9
"""Over the prompts: the errors that matter are those of the prompts that fail first."""
_GATED_SHARES = (1.25, 1.5, 1.75)
"""Computed steps of schedules with a guidance gate, of the forwards that there may be."""
_KEPT = 2
"""Schedules that go on from each step, of those with as many computed steps and the same latest one."""


class Schedule(NamedTuple):
    """Which steps are computed, from 0, the order of the extrapolation between them, and the guidance gate."""

    computed: tuple[int, ...]
    order: int
    gate: int | None = None

    @property
    def forwards(self) -> float:
        """Forwards of the transformer for each guidance branch; where the second one is gated, the mean of both."""
        of_second = sum(self.gate is None or step < self.gate for step in self.computed)
        return (len(self.computed) + of_second) / 2

    def settings(self, steps: int) -> dict[str, Any]:
        """Return arguments of `CacheConfig`, of plain types, for calls of so many steps."""
        order, gate = self.order or None, {} if self.gate is None else {"guidance_gate": self.gate}
        schedule = {"extrapolate": "output", "step_mask": [*self.computed], "steps": steps, "taylorseer_order": order}
        return schedule | gate

    def __str__(self) -> str:
        gate = "" if self.gate is None else f"; second branch before step {self.gate}"
        return f"order {self.order}: {', '.join(map(str, self.computed))}{gate}"


def best_schedule(
    predictions: torch.Tensor, weights: torch.Tensor, gains: torch.Tensor, *, forwards: int, order: int
) -> Schedule:
    """Return the schedule with the smallest predicted error, by beam search.

    Args:
        predictions: of recorded calls, `(steps, prompts, elements)`.
        weights: of each step, `(steps,)`; see `Trajectory.weights`.
        gains: of each step, `(steps,)`: the final error that an error of one in its latents ends as.
        forwards: how many steps are computed, the first one always.
        order: of the extrapolation.
    """
    steps = len(predictions)
    impact = (weights * gains)[:, None, None]
    states: list[tuple[tuple[int, ...], torch.Tensor]] = [((0,), torch.zeros_like(predictions[0]))]
    for step in range(1, steps):
        alike: dict[tuple[int, int], list[tuple[float, tuple[int, ...], torch.Tensor]]] = defaultdict(list)
        for computed, error in states:
            added = impact[step] * (_extrapolated(predictions, computed[-order - 1 :], step) - predictions[step])
            options = [(computed, error + added)]
            if len(computed) < forwards:
                options.append(((*computed, step), error))
            for schedule, total in options:
                if forwards - len(schedule) < steps - step:  # the rest can still be computed
                    alike[len(schedule), schedule[-1]].append((_size(total), schedule, total))
        states = [
            (schedule, total)
            for rivals in alike.values()
            for _, schedule, total in sorted(rivals, key=lambda rival: rival[0])[:_KEPT]
        ]
    finished = [state for state in states if len(state[0]) == forwards]
    return Schedule(min(finished, key=lambda state: _size(state[1]))[0], order)


def best_gated_schedule(
    predictions: torch.Tensor,
    first: torch.Tensor,
    weights: torch.Tensor,
    gains: torch.Tensor,
    *,
    forwards: int,
    order: int,
) -> tuple[float, Schedule] | None:
    """Return the schedule with a guidance gate that has the smallest predicted error, and that error.

    It has more computed steps than `forwards`, and both branches in so many fewer that the mean is `forwards`. What
    guidance adds is taken as the prediction less the first branch, in proportion to what the branches differ by.

    Args:
        predictions, weights, gains, order: as `best_schedule`.
        first: what the first guidance branch returned, `(steps, prompts, elements)`.
        forwards: of the transformer, the mean of both branches.

    Returns:
        None where so few forwards leave no step to a branch alone.
    """
    steps, found = len(predictions), []
    for share in _GATED_SHARES:
        count = min(round(forwards * share), 2 * forwards - 1, steps)
        if count > forwards:
            computed = best_schedule(predictions, weights, gains, forwards=count, order=order).computed
            schedule = Schedule(computed, order, computed[2 * forwards - count])
            found.append((_size(_error(predictions, first, weights * gains, schedule)), schedule))
    return min(found, default=None)


def _error(predictions: torch.Tensor, first: torch.Tensor, impact: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Return what the errors of all steps add up to, `(prompts, elements)`."""
    computed, order, gate = schedule
    total = torch.zeros_like(predictions[0])
    last = max(step for step in computed if gate is None or step < gate)
    for step in range(len(predictions)):
        known = tuple(each for each in computed if each <= step)[-order - 1 :]
        if gate is not None and step >= gate:
            guess = first[step] if step in computed else _extrapolated(first, known, step)
            total += impact[step] * (guess + predictions[last] - first[last] - predictions[step])
        elif step not in computed:
            total += impact[step] * (_extrapolated(predictions, known, step) - predictions[step])
    return total


def injected(predictions: torch.Tensor, weights: torch.Tensor, step: int, order: int) -> torch.Tensor:
    """Return the size of the error that skipping this step alone adds, for each prompt: `(prompts,)`."""
    known = tuple(range(step))[-order - 1 :]
    return (weights[step] * (_extrapolated(predictions, known, step) - predictions[step])).norm(dim=1)


def gains_between(probed: Sequence[int], gains: Sequence[float], steps: int) -> torch.Tensor:
    """Return the gain of each step from those of some, by interpolating their logarithms: `(steps,)`."""
    logs = np.interp(range(steps), probed, np.log(np.maximum(gains, 1e-6)))
    return torch.from_numpy(np.exp(logs)).float()


def _extrapolated(predictions: torch.Tensor, known: tuple[int, ...], step: int) -> torch.Tensor:
    weights = torch.tensor(lagrange_weights(list(known), step))
    return torch.einsum("k,kpe->pe", weights, predictions[list(known)])


def _size(error: torch.Tensor) -> float:
    return float(error.pow(2).mean(1).quantile(_QUANTILE))
