"""`tune`: records stock, searches the recordings, runs the few best, and judges the winner on other prompts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from pipeboost.applied_plan import AppliedPlan
from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError, quoted
from pipeboost.core.fingerprint import digest
from pipeboost.core.ledger import Ledger
from pipeboost.core.user_files import make_folder, user_path
from pipeboost.features.cache.attach import attach_cache
from pipeboost.features.cache.decide import has_separate_branches
from pipeboost.features.cache.extrapolation import sample_elements
from pipeboost.quality.call_metrics import Made
from pipeboost.tune.search import Schedule, best_gated_schedule, best_schedule, gains_between, injected
from pipeboost.tune.tuned import Budget, Judged, Tuned

_RECORDED = 24
"""Calls whose trajectories the search sees, of the tuning prompts."""
_PROBED = 8
"""Calls by which gains are measured, and steps at which they are."""
_ORDERS = (0, 1, 2)
_LEAST_CALLS = 4
_ELEMENTS = 2048
"""Of the latents that are recorded: the same ones in every call, drawn at random."""


@dataclass
class Trajectory:
    """One call, in float32 on the host.

    Attributes:
        predictions: `(steps, elements)`, what the steps were given: the denoiser's output, guidance included.
        latents: `(steps + 1, elements)`, before each step and after the last.
        first: `(steps, elements)`, what the first of two guidance branches returned; None where there are not two.
        size: elements of what the denoiser returned for one sample.
    """

    predictions: torch.Tensor
    latents: torch.Tensor
    first: torch.Tensor | None
    size: int

    @property
    def weights(self) -> torch.Tensor:
        """How far each step moves the latents for one unit of its prediction, `(steps,)`.

        Exact for Euler's method; of methods that look back at earlier predictions it is the part along the latest.
        """
        moves = self.latents[1:] - self.latents[:-1]
        return (moves * self.predictions).sum(1) / self.predictions.pow(2).sum(1).clamp_min(1e-30)


@contextlib.contextmanager
def recorded(pipe: Any, model: torch.nn.Module) -> Iterator[Callable[[], Trajectory]]:
    """Inside, one call is recorded; what this yields returns it afterwards."""
    predictions: list[torch.Tensor] = []
    latents: list[torch.Tensor] = []
    branches: list[list[torch.Tensor]] = []
    outputs: list[torch.Tensor] = []
    sizes: list[int] = []

    def record_branch(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        result = call_next(*args, **kwargs)
        outputs.append(tree_leaves(result)[0])
        sizes.append(sample_elements(result))
        return result

    def record(call_next: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(("model_output", "timestep", "sample"), args, strict=False)), **kwargs}
        result = call_next(*args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        if not latents:
            latents.append(_some(given["sample"]))
        predictions.append(_some(given["model_output"]))
        latents.append(_some(after))
        # Where a script goes on with a part of an output, the elements are others.
        branches.append([_some(each) for each in outputs if each.numel() == given["model_output"].numel()])
        outputs.clear()
        return result

    def trajectory() -> Trajectory:
        of_two = all(len(each) == 2 for each in branches)
        first = torch.stack([each[0] for each in branches]) if of_two else None
        return Trajectory(torch.stack(predictions), torch.stack(latents), first, sizes[0])

    with Ledger() as ledger:
        ledger.add_middleware(pipe.scheduler, "step", record, place="scheduler.tune")
        ledger.add_middleware(model, "__call__", record_branch, place="component.tune")
    try:
        yield trajectory
    finally:
        ledger.undo()


def _some(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    drawn = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))[:_ELEMENTS]
    return flat[drawn.to(flat.device)].float().cpu()


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
    read, plan = Budget.of(budget), applied.plan
    held_out = len(calls) // 3 if held_out is None else held_out
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigurationError(f"share={quoted(share)} must be a share of the prompts, above 0 and at most 1")
    if held_out < 1 or len(calls) - held_out < _LEAST_CALLS:
        raise ConfigurationError(
            f"tune got {len(calls)} prompts, of which {held_out} are held out; it needs at least {_LEAST_CALLS} to "
            "tune on and one to judge by"
        )
    if plan["cache"].on:
        raise ConfigurationError("tune needs an acceleration without a cache; accelerate with cache=None first")
    if not plan.family.pipelines or len(plan.family.models(pipe)) != 1 or applied.team is not None:
        raise UnsupportedError(
            f"tune cannot search schedules of {plan.model.pipeline}: it knows pipelines of a family with one denoiser, "
            "on one rank; give CacheConfig(step_mask=...) by hand"
        )
    where = None if folder is None else user_path(folder, "folder")
    if where is not None:
        make_folder(where, f"folder {where}")
    trials = _Trials(pipe, applied, calls, read, stock, where, progress)
    return _tune(trials, share, range(len(calls) - held_out), range(len(calls) - held_out, len(calls)))


def _tune(trials: _Trials, share: float, tuning: range, judging: range) -> Tuned:
    budget, few = trials.budget, tuning[:_RECORDED]
    trajectories = [trials.run(None, call)[1] for call in few]
    counts = {len(trajectory.predictions) for trajectory in trajectories}
    if len(counts) != 1 or counts == {1}:
        raise UnsupportedError(f"tune needs calls of as many steps each, two or more, and these make {sorted(counts)}")
    (steps,) = counts
    predictions = torch.stack([each.predictions for each in trajectories], dim=1)
    weights = torch.stack([each.weights for each in trajectories]).mean(0)
    gains = _measured_gains(trials, trajectories[:_PROBED], predictions[:, :_PROBED], weights)
    firsts = [each.first for each in trajectories if each.first is not None and has_separate_branches(trials.family)]
    first = torch.stack(firsts, dim=1) if len(firsts) == len(trajectories) else None
    tried: dict[int, Judged] = {}

    def proposals(forwards: int) -> dict[Schedule, None]:
        """Return the best schedule of each order, and the best with a guidance gate where there are two branches."""
        if forwards >= steps:
            return {Schedule(tuple(range(steps)), 0): None}
        found = [best_schedule(predictions, weights, gains, forwards=forwards, order=order) for order in _ORDERS]
        if first is not None:
            gated = [
                best_gated_schedule(predictions, first, weights, gains, forwards=forwards, order=order)
                for order in _ORDERS
            ]
            found += [schedule for _, schedule in sorted(each for each in gated if each is not None)[:1]]
        return dict.fromkeys(found)

    def keeps(forwards: int) -> bool:
        rivals = {schedule: trials.judged(schedule, few) for schedule in proposals(forwards)}
        best = max(rivals, key=lambda schedule: _merit(rivals[schedule], budget))
        tried[forwards] = trials.judged(best, tuning)
        return tried[forwards].share(budget) >= share

    low, high = 1, 2
    while high < steps and not keeps(high):
        low, high = high, min(2 * high, steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    if high not in tried:
        keeps(high)
    schedule = tried[high].schedule
    assert schedule is not None
    best, rival = trials.judged(schedule, judging), trials.judged(high, judging)
    schedules = [tried[forwards] for forwards in sorted(tried)]
    fewer = [trials.judged(forwards, few) for forwards in sorted(tried)]
    return Tuned(
        budget=budget,
        share=share,
        steps=steps,
        best=best,
        rival=rival,
        tried=(*schedules, *fewer),
        pipeline=trials.applied.plan.model.pipeline,
        latents=trajectories[0].size,
    )


def _merit(judged: Judged, budget: Budget) -> tuple[float, float]:
    return judged.share(budget), budget.merit(median(judged.values))


def _measured_gains(
    trials: _Trials, stock: Sequence[Trajectory], predictions: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the gain of each step, from what a few calls make of single skipped steps."""
    steps, gains = len(predictions), []
    probed = sorted({round(step) for step in np.geomspace(1, steps - 1, _PROBED)})
    for step in probed:
        added = injected(predictions, weights, step, order=1)
        schedule = Schedule(tuple(each for each in range(steps) if each != step), 1)
        ran = [trials.run(schedule, call)[1] for call in range(len(stock))]
        ended = [(ours.latents[-1] - theirs.latents[-1]).norm() for ours, theirs in zip(ran, stock, strict=True)]
        gains.append(float((torch.stack(ended) / added.clamp_min(1e-12)).quantile(0.9)))
    return gains_between(probed, gains, steps)


@dataclass
class _Trials:
    """Runs calls, and judges each way to make one once: what it gave is kept, in a folder too.

    What is tried is a schedule, stock with this many steps, or None for stock as it is.
    """

    pipe: Any
    applied: AppliedPlan
    calls: Sequence[Mapping[str, Any]]
    budget: Budget
    stock: Callable[[], AbstractContextManager[Any]]
    folder: Path | None
    progress: Callable[[int], None] | None
    made: int = 0
    stock_runs: dict[int, tuple[Made, Trajectory]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.family = self.applied.plan.family
        ((_, self.model),) = self.family.models(self.pipe).items()
        self.about = [""] * len(self.calls)
        self.file = None if self.folder is None else self.folder / "values.jsonl"
        if self.file is not None:
            # What was measured holds for this model, scheduler and call alone; a line cut off by a kill is dropped.
            about = type(self.pipe).__name__, dict(self.pipe.scheduler.config), dict(self.model.state_dict())
            self.about = [digest((about, dict(call))).hex() for call in self.calls]
            text = self.file.read_text() if self.file.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            self.file.write_text(whole)
            self.values = {entry["trial"]: entry["value"] for entry in map(json.loads, whole.splitlines())}

    def judged(self, tried: Schedule | int, calls: Sequence[int]) -> Judged:
        """Judge a schedule, or stock with this many steps, by some calls."""
        values = tuple(self._value(tried, call) for call in calls)
        if isinstance(tried, Schedule):
            return Judged("schedule", round(tried.forwards), tried, values)
        return Judged("stock", tried, None, values)

    def _value(self, tried: Schedule | int, call: int) -> float:
        way = f"{tried.order} {tried.computed} {tried.gate}" if isinstance(tried, Schedule) else f"stock {tried}"
        trial = f"{self.budget.metric} {self.about[call]} {call} {way}"
        if trial not in self.values:
            self.values[trial] = self.budget.measure(self.run(tried, call)[0], self.run(None, call)[0])
            if self.file is not None:
                with self.file.open("a") as file:
                    file.write(json.dumps({"trial": trial, "value": self.values[trial]}) + "\n")
        return self.values[trial]

    def run(self, tried: Schedule | int | None, call: int) -> tuple[Made, Trajectory]:
        """Return a call's result and trajectory."""
        if tried is None and call in self.stock_runs:
            return self.stock_runs[call]
        arguments = {**self.calls[call], "generator": torch.Generator("cpu").manual_seed(call)}
        running: AbstractContextManager[Any]
        if isinstance(tried, Schedule):
            running = self._cached(tried, len(self.run(None, call)[1].predictions))
        else:
            running = self.stock()
            arguments |= {} if tried is None else {"num_inference_steps": tried}
        with running, recorded(self.pipe, self.model) as trajectory:
            result = self.pipe(**arguments)
        self.made += 1
        if self.progress is not None:
            self.progress(self.made)
        ran = Made.of(result, arguments), trajectory()
        if tried is None:
            self.budget.require(ran[0])
            self.stock_runs[call] = ran
        return ran

    @contextlib.contextmanager
    def _cached(self, schedule: Schedule, steps: int) -> Iterator[None]:
        settings = CacheConfig(**schedule.settings(steps))
        ledger = Ledger()
        with ledger:
            attach_cache(self.model, settings, self.family, ledger, owner=self.applied)
        try:
            yield
        finally:
            ledger.undo()
