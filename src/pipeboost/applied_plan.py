"""`AppliedPlan`: a plan applied to one pipeline, and kept so while the user changes that pipeline."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeboost.apply import apply, join, rebind
from pipeboost.contract.call import Call
from pipeboost.contract.context import ApplyContext, Component, Counters
from pipeboost.core.config import AccelerationConfig
from pipeboost.core.errors import PipeboostError
from pipeboost.core.hardware import device_of
from pipeboost.core.ledger import Ledger
from pipeboost.features.offload.place import placed_components, stock_offload
from pipeboost.features.parallel.rank_team import RankTeam
from pipeboost.plan import Plan, agreed_plan
from pipeboost.stages import StageParallelism
from pipeboost.stages.composition import TEXT_ENCODING, Composition
from pipeboost.stages.instrument import instrumented_components


@dataclass
class Applied:
    """One component of a pipeline, or of a view of it, and what was done to it.

    It holds the component weakly: what the pipeline drops must free its memory at once.

    Attributes:
        path: of the component from the pipeline; empty for the pipeline itself.
        target: the component.
        of_view: whether only a view of the pipeline has it.
        ledger: undoes what was done.
        counters: feature → what it counts.
    """

    path: str
    target: weakref.ref[Any]
    of_view: bool
    ledger: Ledger = field(default_factory=Ledger)
    counters: dict[str, Counters] = field(default_factory=dict)


class AppliedPlan:
    """What a plan has made of one pipeline; the owner of its calls.

    It holds pipeline and components weakly: what the user drops must free its memory at once.

    Args:
        pipe: the pipeline.
        plan: for it; `apply` does what it says.
        config: the settings it was made from.

    Attributes:
        plan: the plan; another one once the pipeline is moved.
        stages: the stages of a call.
        context: what the features may know.
        components: what was done to each component, by its `id`.
        running: calls that run; meanwhile nothing is planned anew or removed.
        active: whether it has been applied in full, and is not being taken off.
        removed: whether it has been taken off, for good.
    """

    def __init__(self, pipe: Any, plan: Plan, config: AccelerationConfig) -> None:
        self.plan = plan
        self.stages = Composition(plan.family, pipe)
        self.context = self._context(plan)
        self.components: dict[int, Applied] = {}
        self.running: set[Call] = set()
        self.active = self.removed = False
        self._pipe = weakref.ref(pipe)
        self._config = config
        self._joined = Ledger()
        self._lock = threading.RLock()

    def apply(self, pipe: Any, ledger: Ledger) -> None:
        """Do what the plan says.

        Args:
            ledger: takes what undoes all of it; what fails half-way is undone with it.
        """
        ledger.record("what was joined", self._leave)
        self._join(pipe)
        ledger.record("components", self._undo_all)
        self.bind_on_all_ranks(pipe, "accelerate_pipeline", compare=False)
        self.active = True

    @property
    def pipe(self) -> Any:
        """The pipeline itself, no view of it; None once it is gone."""
        return self._pipe()

    @property
    def team(self) -> RankTeam | None:
        """The ranks that run the pipeline together; None for one rank."""
        return self.context.joined.get("parallel")

    def counters(self, feature: str) -> dict[str, dict[str, Any]]:
        """Return what a feature has counted, by path of the component."""
        counted = self.components.values()
        return {each.path: each.counters[feature].summary() for each in counted if feature in each.counters}

    @contextlib.contextmanager
    def used_by(self, call: Call) -> Iterator[None]:
        """Inside, a call runs, and the plan stays as it is. Under offload, stages are offloaded after the last one.

        Raises:
            PipeboostError: the plan has been taken off.
        """
        with self._lock:
            if self.removed:
                raise PipeboostError("this acceleration was removed while the call was starting")
            self.running.add(call)
        try:
            yield
        finally:
            with self._lock:
                self.running.discard(call)
                if self.plan["offload"].on and not self.running:
                    self.stages.offload()

    def begin_removal(self) -> None:
        """From now on no call begins and nothing is bound; then the ledger can undo what there is.

        Raises:
            PipeboostError: a call is running.
        """
        with self._lock:
            self.refuse_while_running()
            self.active, self.removed = False, True
        self.stages.offload()

    def refuse_while_running(self) -> None:
        """Raise where it cannot be taken off now.

        Raises:
            PipeboostError: a call is running.
        """
        if self.running:
            raise PipeboostError("a call of this pipeline is running; wait for it, or cancel() it, then remove()")

    def follow_device(self, pipe: Any) -> torch.device:
        """Plan anew where the pipeline was moved to another kind of device since, as `pipe.to("cuda")` does.

        So it is where Diffusers' own offload was turned on since: ours steps back.

        Returns:
            Where the call will run.
        """
        device = device_of(pipe)
        with self._lock:
            taken_over = self.plan["offload"].on and stock_offload(pipe)
            unmoved = device.type == self.plan.hardware.device
            if (unmoved and not taken_over) or self.running or self.removed or pipe is not self.pipe:
                return device
            plan = agreed_plan(pipe, replace(self._config, offload=None) if taken_over else self._config, anew=True)
            self._undo_all()
            self._leave()
            self.plan, self.context = plan, self._context(plan)
            self._join(pipe)
        return device_of(pipe)

    def bind_on_all_ranks(self, pipe: Any, doing: str, *, compare: bool = True) -> None:
        """As `bind`; an error on one rank is an error on all, and what was bound is stock again on all.

        Args:
            compare: whether the ranks then make sure that they run with the same weights and settings, for a call.

        Raises:
            DisagreementError: they do not.
            Exception: what this rank has raised.
            RankFailedError: another rank has raised something.
        """
        team = self.team
        if team is None:
            self.bind(pipe)
            return
        before = dict(self.components)
        with team.watched(doing):
            try:
                with team.collective_errors(doing):
                    self.bind(pipe)
            except BaseException:
                for key in reversed(tuple(self.components)):
                    if self.components[key] is not before.get(key):
                        self._undo(key)
                raise
            if compare:
                team.require_same_state(pipe, self.stages.run_on_all_ranks)

    def bind(self, pipe: Any) -> None:
        """Apply the features to what `pipe` consists of now; cheap when nothing was replaced since the last call."""
        with self._lock:
            if self.removed:
                return
            of_view, denoisers = pipe is not self.pipe, self.plan.family.models(pipe)
            objects: dict[str, Any] = instrumented_components(pipe, self.plan.family)
            if self.plan["offload"].on:
                objects |= placed_components(pipe)
            if self.team is not None:
                objects |= self.team.components(pipe)
            for key, applied in tuple(self.components.items()):
                target = applied.target()
                replaced = not of_view and not applied.of_view and objects.get(applied.path) is not target
                # A view may be in the middle of a call with what the pipeline itself has given up.
                if target is None or (replaced and not self.running):
                    self._undo(key)
            for path, obj in objects.items():
                component, known = Component(path, obj, path in denoisers), self.components.get(id(obj))
                if known is not None and known.target() is obj:
                    rebind(component, self.context)
                    continue
                applied = self.components[id(obj)] = Applied(path, weakref.ref(obj), of_view)
                try:
                    applied.counters = apply(component, self.context, applied.ledger)
                finally:
                    self._drop_if_stock(id(obj))

    def _undo(self, key: int) -> None:
        try:
            self.components[key].ledger.undo()
        finally:
            self._drop_if_stock(key)

    def _undo_all(self) -> None:
        everything = Ledger()
        for key, applied in self.components.items():
            everything.record(applied.path, functools.partial(self._undo, key))
        everything.undo()

    def _drop_if_stock(self, key: int) -> None:
        if not self.components[key].ledger.changes:
            del self.components[key]

    def _context(self, plan: Plan) -> ApplyContext:
        owner = weakref.ref(self)
        return ApplyContext(plan.decisions, plan.quality, plan.family, plan.hardware, plan.model, owner)

    def _join(self, pipe: Any) -> None:
        self.context = join(pipe, self.context, self._joined)
        if self.team is not None and self.team.text_encoders and TEXT_ENCODING in self.stages:
            # None of these changes may hold on to this plan: a dropped pipeline frees its memory at once.
            stage = self.stages[TEXT_ENCODING]
            undo = functools.partial(setattr, stage, "parallelism", StageParallelism.MAIN_RANK)
            self._joined.record("text encoding", undo)
            stage.parallelism = StageParallelism.TENSOR_PARALLEL

    def _leave(self) -> None:
        self._joined.undo()
        self.context = self._context(self.plan)
