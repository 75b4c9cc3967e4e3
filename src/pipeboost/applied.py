"""`AppliedPlan`: a plan as it is applied to one pipeline, and kept so while the user changes that pipeline."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from pipeboost.apply import Part, accelerate_part
from pipeboost.contract.call import Call
from pipeboost.contract.model_info import facts_of
from pipeboost.contract.registry import family_of
from pipeboost.core.config import AccelerationConfig, ParallelConfig
from pipeboost.core.errors import PipeboostError
from pipeboost.core.hardware import detect_hardware, device_of
from pipeboost.core.ledger import Ledger
from pipeboost.distributed import announce, decline, meet, world_size
from pipeboost.features.attention import rebind_attention
from pipeboost.features.offload import execution_device, placed_components, stock_offload
from pipeboost.features.parallel.rank_team import Team, to_own_device
from pipeboost.features.reuse import PromptReuse
from pipeboost.plan import Plan, make_plan
from pipeboost.stages import TEXT_ENCODING, Composition, StageParallelism, watched_components

_PLANS = "plans"


def plan_for(pipe: Any, config: AccelerationConfig) -> Plan:
    """The plan for a pipeline where it is now.

    Raises:
        PipeboostError: as `make_plan`.
    """
    family = family_of(pipe)
    device = execution_device(pipe, config.offload)
    return make_plan(config, detect_hardware(device), family, facts_of(pipe, family, device))


def agreed_plan(pipe: Any, config: AccelerationConfig, check: Callable[[], None] = lambda: None) -> Plan:
    """As `plan_for`; where ranks are to share the pipeline all of them have a plan, or none has.

    Each rank's pipeline is moved to its own device first; nothing else is changed.

    Args:
        check: raises what else speaks against applying a plan to this rank's pipeline.

    Raises:
        PipeboostError: as `make_plan` and `check`.
        RankFailedError: another rank has no plan; its traceback says why.
    """
    count, layout = world_size(), config.parallel
    if count == 1 or layout is None:
        check()
        return plan_for(pipe, config)
    group = layout.group if isinstance(layout, ParallelConfig) else None
    ranks = range(count) if group is None else torch.distributed.get_process_group_ranks(group)
    announce()
    try:
        check()
        to_own_device(pipe)
        plan = plan_for(pipe, config)
    except Exception as error:
        # Ranks that would work apart come to no meeting.
        if isinstance(layout, ParallelConfig) or family_of(pipe).shares_samples:
            decline(_PLANS, ranks, error)
        raise
    if plan["parallel"].on:
        meet(_PLANS, ranks, "ready")
    return plan


class AppliedPlan:
    """The team, the stages and the parts that a plan has made of one pipeline; the owner of its calls.

    It holds pipeline and components weakly: what the user drops must free its memory at once.

    Args:
        pipe: the pipeline.
        plan: for it.
        config: the settings it was made from.
        ledger: takes what undoes all of it; what fails half-way is undone with it.

    Attributes:
        plan: the plan; another one once the pipeline is moved.
        stages: the stages of a call.
        team: the ranks that run the pipeline together; None for one rank.
        parts: what was done to each component, by its `id`.
        running: calls that run; meanwhile nothing is planned anew or removed.
        removed: whether it has been taken off, for good.
    """

    def __init__(self, pipe: Any, plan: Plan, config: AccelerationConfig, ledger: Ledger) -> None:
        self.plan = plan
        self.stages = Composition(plan.family, pipe)
        self.team: Team | None = None
        self.parts: dict[int, Part] = {}
        self.running: set[Call] = set()
        self.removed = False
        self._pipe = weakref.ref(pipe)
        self._config = config
        self._prompts: PromptReuse | None = None
        self._lock = threading.RLock()
        ledger.record("ranks", self._leave_team)
        self._join_team(pipe, plan)
        if plan["reuse"].on:
            self._prompts = PromptReuse(plan["reuse"].settings, owner=self, denoisers=plan.family.denoisers)
            ledger.record("kept prompts", self._prompts.clear)
        ledger.record("components", self._undo_all_parts)
        self.bind_on_all_ranks(pipe, "accelerate_pipeline")

    @property
    def pipe(self) -> Any:
        """The pipeline itself, no view of it; None once it is gone."""
        return self._pipe()

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
            self.removed = True
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
            if (unmoved and not taken_over) or self.running or pipe is not self.pipe:
                return device
            plan = agreed_plan(pipe, replace(self._config, offload=None) if taken_over else self._config)
            self._undo_all_parts()
            self._leave_team()
            self._join_team(pipe, plan)
            self.plan = plan
        return device_of(pipe)

    def bind_on_all_ranks(self, pipe: Any, doing: str) -> None:
        """As `bind`; an error on one rank is an error on all, and what was bound is stock again on all.

        Raises:
            Exception: what this rank has raised.
            RankFailedError: another rank has raised something.
        """
        team = self.team
        if team is None:
            self.bind(pipe)
            return
        before = dict(self.parts)
        with team.watched(lambda: doing):
            try:
                with team.all_or_none(doing):
                    self.bind(pipe)
            except BaseException:
                for key in reversed(tuple(self.parts)):
                    if self.parts[key] is not before.get(key):
                        self._undo_part(key)
                raise

    def bind(self, pipe: Any) -> None:
        """Stand in the doors of what `pipe` consists of now; cheap when nothing was replaced since the last call."""
        with self._lock:
            if self.removed:
                return
            plan, team, of_view = self.plan, self.team, pipe is not self.pipe
            models = plan.family.models(pipe)
            components: dict[str, Any] = watched_components(pipe, plan.family)
            if plan["offload"].on:
                components |= placed_components(pipe)
            if team is not None:
                components |= team.components(pipe)
            for key, part in tuple(self.parts.items()):
                target = part.target()
                replaced = not of_view and not part.of_view and components.get(part.path) is not target
                # A view may be in the middle of a call with what the pipeline itself has given up.
                if target is None or (replaced and not self.running):
                    self._undo_part(key)
            for path, obj in components.items():
                known = self.parts.get(id(obj))
                if known is not None and known.target() is obj:
                    if path in models and plan["attention"].on:
                        rebind_attention(models[path])
                        if team is not None:
                            team.refuse_stock_processors(models[path])
                    continue
                part = accelerate_part(path, obj, plan, team=team, prompts=self._prompts, owner=self, of_view=of_view)
                if part.ledger.changes:
                    self.parts[id(obj)] = part

    def _undo_part(self, key: int) -> None:
        self.parts.pop(key).ledger.undo()

    def _undo_all_parts(self) -> None:
        for key in reversed(tuple(self.parts)):
            self._undo_part(key)

    def _join_team(self, pipe: Any, plan: Plan) -> None:
        """Form the plan's team with the other ranks; each of them is at this point of its program."""
        if plan["parallel"].on:
            self.team = Team(pipe, plan)
            if self.team.text_encoders and TEXT_ENCODING in self.stages:
                self.stages[TEXT_ENCODING].parallelism = StageParallelism.TENSOR_PARALLEL

    def _leave_team(self) -> None:
        if self.team is not None:
            self.team.leave()
            if self.team.text_encoders and TEXT_ENCODING in self.stages:
                self.stages[TEXT_ENCODING].parallelism = StageParallelism.MAIN_RANK
        self.team = None
