"""`tune`: records stock, searches the recordings, runs the few best, and judges the winner on other prompts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeboost.applied_plan import AppliedPlan
from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError, quoted
from pipeboost.core.fingerprint import digest
from pipeboost.core.ledger import Ledger
from pipeboost.core.user_files import make_folder, user_path
from pipeboost.features.cache.attach import attach_cache
from pipeboost.quality.metrics import outputs_on_host
from pipeboost.tune.budget import Budget
from pipeboost.tune.recording import Trajectory, recorded
from pipeboost.tune.search import Schedule, best_schedule, gains_between, injected
from pipeboost.tune.tuned import Judged, Tuned

_RECORDED = 24
"""Calls whose trajectories the search sees, of the tuning prompts."""
_PROBED = 8
"""Calls by which gains are measured, and steps at which they are."""
_ORDERS = (0, 1, 2)
_LEAST_CALLS = 4

Cached = Callable[[CacheConfig], AbstractContextManager[None]]


def tune(
    pipe: Any,
    applied: AppliedPlan,
    calls: Sequence[Mapping[str, Any]],
    *,
    budget: str,
    share: float,
    held_out: int | None,
    stock: Callable[[], AbstractContextManager[Any]],
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tuned:
    """Find the schedule with the fewest computed forwards that keeps a budget; see `Acceleration.tune`.

    Args:
        pipe: the accelerated pipeline, and what is applied to it.
        calls: arguments of one call each; each gets a generator with its own seed.
        stock: context in which the pipeline runs stock.

    Raises:
        ConfigurationError: the budget or share cannot be read, or there are too few calls.
        UnsupportedError: the pipeline cannot be searched, or the calls make different numbers of steps.
    """
    read = Budget.of(budget)
    held_out = len(calls) // 3 if held_out is None else held_out
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigurationError(f"share={quoted(share)} must be a share of the prompts, above 0 and at most 1")
    if held_out < 1 or len(calls) - held_out < _LEAST_CALLS:
        raise ConfigurationError(
            f"tune got {len(calls)} prompts, of which {held_out} are held out; it needs at least {_LEAST_CALLS} to "
            "tune on and one to judge by"
        )
    cached = _cached_by(pipe, applied)
    ((_, model),) = applied.plan.family.models(pipe).items()
    where = None if folder is None else user_path(folder, "folder")
    if where is not None:
        make_folder(where, f"folder {where}")
    return _tune(
        _Trials(pipe, model, calls, read, stock, cached, where, progress), share, len(calls) - held_out, len(calls)
    )


def _cached_by(pipe: Any, applied: AppliedPlan) -> Cached:
    """Return the context in which calls run with a cache; raise where there can be none."""
    plan = applied.plan
    models = plan.family.models(pipe)
    if plan["cache"].on:
        raise ConfigurationError("tune needs an acceleration without a cache; accelerate with cache=None first")
    if not plan.family.pipelines or len(models) != 1 or applied.team is not None:
        raise UnsupportedError(
            f"tune cannot search schedules of {plan.model.pipeline}: it knows pipelines of a family with one denoiser, "
            "on one rank; give CacheConfig(step_mask=...) by hand"
        )
    ((_, model),) = models.items()

    @contextlib.contextmanager
    def cached(settings: CacheConfig) -> Iterator[None]:
        ledger = Ledger()
        with ledger:
            attach_cache(model, settings, plan.family, ledger, owner=applied)
        try:
            yield
        finally:
            ledger.undo()

    return cached


def _tune(trials: _Trials, share: float, first_held_out: int, count: int) -> Tuned:
    budget = trials.budget
    tuning, judging = range(first_held_out), range(first_held_out, count)
    trajectories = [trials.stock_trajectory(call) for call in tuning[:_RECORDED]]
    steps = {len(trajectory.predictions) for trajectory in trajectories}
    if len(steps) != 1 or steps == {1}:
        raise UnsupportedError(f"tune needs calls of as many steps each, two or more, and these make {sorted(steps)}")
    proposals = _Proposals(trajectories, trials)
    tried: dict[int, Judged] = {}

    def keeps(forwards: int) -> bool:
        rivals = [trials.judged(schedule, tuning[:_RECORDED]) for schedule in proposals.of(forwards)]
        best = max(rivals, key=lambda rival: (rival.share(budget), median(rival.values)))
        assert best.schedule is not None
        tried[forwards] = trials.judged(best.schedule, tuning)
        return tried[forwards].share(budget) >= share

    low, high = 1, 2
    while high < proposals.steps and not keeps(high):
        low, high = high, min(2 * high, proposals.steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    if high not in tried:
        keeps(high)
    schedule = tried[high].schedule
    assert schedule is not None
    fewer = tuple(trials.judged_stock(forwards, tuning[:_RECORDED]) for forwards in sorted(tried))
    return Tuned(
        budget=budget,
        share=share,
        steps=proposals.steps,
        best=trials.judged(schedule, judging),
        rival=trials.judged_stock(high, judging),
        tried=(*(tried[forwards] for forwards in sorted(tried)), *fewer),
    )


class _Proposals:
    """Schedules to try, from recordings of stock and from what a few calls made of single skipped steps."""

    def __init__(self, trajectories: Sequence[Trajectory], trials: _Trials) -> None:
        self.steps = len(trajectories[0].predictions)
        self._predictions = torch.stack([each.predictions for each in trajectories], dim=1)
        self._weights = torch.stack([each.weights for each in trajectories]).mean(0)
        few = trajectories[:_PROBED]
        probed = sorted({round(step) for step in np.geomspace(1, self.steps - 1, _PROBED)})
        gains = []
        for step in probed:
            added = injected(self._predictions[:, : len(few)], self._weights, step, order=1)
            schedule = Schedule(tuple(each for each in range(self.steps) if each != step), 1)
            ended = torch.stack(
                [
                    (trials.trajectory(schedule, call).latents[-1] - stock.latents[-1]).norm()
                    for call, stock in enumerate(few)
                ]
            )
            gains.append(float((ended / added.clamp_min(1e-12)).quantile(0.9)))
        self._gains = gains_between(probed, gains, self.steps)

    def of(self, forwards: int) -> list[Schedule]:
        """Return the best schedule of each order."""
        if forwards >= self.steps:
            return [Schedule(tuple(range(self.steps)), 0)]
        found = [
            best_schedule(self._predictions, self._weights, self._gains, forwards=forwards, order=order)
            for order in _ORDERS
        ]
        return list(dict.fromkeys(found))


class _Trials:
    """Runs calls, each once: what they gave is kept, in a folder too."""

    def __init__(
        self,
        pipe: Any,
        model: torch.nn.Module,
        calls: Sequence[Mapping[str, Any]],
        budget: Budget,
        stock: Callable[[], AbstractContextManager[Any]],
        cached: Cached,
        folder: Path | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._pipe = pipe
        self._calls = calls
        self.budget = budget
        self._stock = stock
        self._cached = cached
        self._folder = folder
        self._progress = progress
        self._results: dict[int, np.ndarray] = {}
        self._trajectories: dict[int, Trajectory] = {}
        self._values: dict[str, float] = {}
        self._made = 0
        self._about = [""] * len(calls)
        if folder is not None:
            # What was measured holds for this model, scheduler and call alone; a line cut off by a kill is dropped.
            about = type(pipe).__name__, dict(pipe.scheduler.config), dict(model.state_dict())
            self._about = [digest((about, dict(call))).hex() for call in calls]
            path = folder / "values.jsonl"
            text = path.read_text() if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            path.write_text(whole)
            self._values = {entry["trial"]: entry["value"] for entry in map(json.loads, whole.splitlines())}

    def stock_trajectory(self, call: int) -> Trajectory:
        """Return the trajectory of stock."""
        self._stock_result(call)
        return self._trajectories[call]

    def trajectory(self, schedule: Schedule, call: int) -> Trajectory:
        """Return the trajectory with a schedule."""
        with self._cached(_settings(schedule, len(self.stock_trajectory(call).predictions))):
            return self._run(call)[1]

    def judged(self, schedule: Schedule, calls: Sequence[int]) -> Judged:
        """Judge a schedule by some calls."""
        values = []
        for call in calls:

            def run(call: int = call) -> np.ndarray:
                with self._cached(_settings(schedule, len(self.stock_trajectory(call).predictions))):
                    return self._run(call)[0]

            values.append(self._value(f"{call} {schedule.order} {schedule.computed}", call, run))
        return Judged("schedule", len(schedule.computed), schedule, tuple(values))

    def judged_stock(self, steps: int, calls: Sequence[int]) -> Judged:
        """Judge stock with this many steps by some calls."""
        values = []
        for call in calls:

            def run(call: int = call) -> np.ndarray:
                with self._stock():
                    return self._run(call, num_inference_steps=steps)[0]

            values.append(self._value(f"{call} stock {steps}", call, run))
        return Judged("stock", steps, None, tuple(values))

    def _value(self, trial: str, call: int, run: Callable[[], np.ndarray]) -> float:
        trial = f"{self.budget.metric} {self._about[call]} {trial}"
        if trial not in self._values:
            self._values[trial] = self.budget.measure(run(), self._stock_result(call))
            if self._folder is not None:
                with (self._folder / "values.jsonl").open("a") as file:
                    file.write(json.dumps({"trial": trial, "value": self._values[trial]}) + "\n")
        return self._values[trial]

    def _stock_result(self, call: int) -> np.ndarray:
        if call not in self._results:
            with self._stock():
                self._results[call], self._trajectories[call] = self._run(call)
        return self._results[call]

    def _run(self, call: int, **changed: Any) -> tuple[np.ndarray, Trajectory]:
        arguments = {**self._calls[call], "generator": torch.Generator("cpu").manual_seed(call), **changed}
        with recorded(self._pipe) as trajectory:
            result = self._pipe(**arguments)
        self._made += 1
        if self._progress is not None:
            self._progress(self._made)
        return next(iter(outputs_on_host(result).values())).numpy(), trajectory()


def _settings(schedule: Schedule, steps: int) -> CacheConfig:
    return CacheConfig(
        extrapolate="output", step_mask=schedule.computed, steps=steps, taylorseer_order=schedule.order or None
    )
