"""What surrounds one call of an accelerated pipeline, on each rank that has a part in it.

The third of three recipes: `Calls.run`.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from pipeboost.applied_plan import AppliedPlan
from pipeboost.contract.call import Call, assigned, current_call, no_call, open_call
from pipeboost.core.errors import PipeboostError
from pipeboost.core.locks import Locks
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.features.offload.place import residing
from pipeboost.stages.call_record import ADMISSION, AdmissionQueue, CallRecord, take_record
from pipeboost.stages.composition import STAGES
from pipeboost.stages.instrument import TRAJECTORY, Trajectory, with_trajectory, without_trajectory
from pipeboost.stages.report import Report, component_bytes
from pipeboost.stages.spans import RECORDER, WHOLE_CALL, Progress, Recorder

_paused: ContextVar[frozenset[int]] = ContextVar("pipeboost_paused", default=frozenset())
_profiled: ContextVar[bool] = ContextVar("pipeboost_profiled", default=False)
_scheduler_locks = Locks()
"""A call goes through the state of its scheduler, or else its pipeline: calls that share one run in turn."""


class Calls:
    """The calls of one accelerated pipeline, and of views of it.

    Args:
        applied: what they run with.

    Attributes:
        progress: called at each stage and denoising step; None where nobody asks.
        finished: makes the report of the latest call that has returned, or request whose result was taken.
        queue: the order of the calls of the pipeline itself, and of its requests; on several ranks, of all calls.
        records: of the calls and requests that wait or run.
    """

    def __init__(self, applied: AppliedPlan) -> None:
        self.applied = applied
        self.progress: Callable[[Progress], None] | None = None
        self.finished: Callable[..., Report] | None = None
        self.queue = AdmissionQueue()
        self.records: set[CallRecord] = set()

    def run(self, call_next: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """Make one call of the pipeline: the middleware on its `__call__`."""
        applied = self.applied
        if not applied.active or self.are_paused:
            with no_call(), residing(pipe):
                return call_next(*args, **kwargs)
        record = take_record()
        with self.admitted(record, pipe), _scheduler_locks.of(getattr(pipe, "scheduler", None) or pipe):
            if not applied.active:  # while this call waited
                return self.run(call_next, pipe, *args, **kwargs)
            signature = signature_of(stock_class(pipe), "__call__")
            kwargs, wants_trajectory = without_trajectory(signature, kwargs)
            device = applied.follow_device(pipe)
            team = applied.team
            with contextlib.nullcontext() if team is None else team.watched("the call's start"):
                applied.bind_on_all_ranks(pipe, "the call's start")
                if team is None:
                    bound = signature.bind(pipe, *args, **kwargs)
                else:
                    bound = team.agreed(signature, pipe, args, kwargs)
                    args, kwargs = bound.args[1:], bound.kwargs
                bound.apply_defaults()
                with self.opened(pipe, dict(bound.arguments), device, record) as call:
                    call.raise_if_cancelled()
                    if applied.plan.family.pipelines:
                        applied.stages.verify_arguments(call.arguments)
                    if wants_trajectory:
                        call[TRAJECTORY] = Trajectory()
                    with call[RECORDER].span(WHOLE_CALL):
                        result = call_next(*args, **kwargs)
                    result = with_trajectory(result, call.get(TRAJECTORY))
        if not record.kept:
            self.finished = record.finished
        return result

    @contextlib.contextmanager
    def admitted(self, record: CallRecord, pipe: Any) -> Iterator[None]:
        """Inside, this call has been admitted; one inside another call, and one of a view on one rank, need not wait.

        Raises:
            Cancelled: it was cancelled while it waited.
        """
        together = self.applied.team is not None
        waits = record.queue is None and current_call() is None and (together or pipe is self.applied.pipe)
        if waits:
            self.queue.enter(record, alone=True, must_run=together)
        self.records.add(record)
        try:
            with record.admitted() if waits else contextlib.nullcontext():
                yield
        finally:
            self.records.discard(record)

    @contextlib.contextmanager
    def opened(self, pipe: Any, arguments: dict[str, Any], device: torch.device, record: CallRecord) -> Iterator[Call]:
        """Inside, a call is open on this rank."""
        applied, features = self.applied, self.applied.plan.features
        mesh = None if applied.team is None else applied.team.mesh
        if self.progress is not None:
            record.listeners.append(self.progress)
        notify = record.note if record.kept or record.listeners else None
        opening = open_call(pipe, owner=applied, arguments=arguments, features=features, device=device, mesh=mesh)
        with opening as call, applied.used_by(call), record.following(call):
            call.rebind = functools.partial(applied.bind, pipe)
            call[STAGES] = applied.stages.for_call(mesh)
            call[RECORDER] = Recorder(call, exact_peaks=_profiled.get(), progress=notify)
            if record.queue is not None and not record.alone:
                call[ADMISSION] = record
            with residing(pipe):
                yield call

    def cancel(self, call: Call | None = None) -> None:
        """Make all calls that run or wait for their turn, or one, raise `Cancelled` at their next denoising step."""
        if call is None:
            for record in tuple(self.records):
                record.cancel()
        elif call in self.applied.running:
            call.cancel()

    def report_of(self, finished: Callable[..., Report]) -> Report:
        """Return the report of a call that has ended."""
        applied, pipe = self.applied, self.applied.pipe
        return finished(
            pipeline=applied.plan.model.pipeline,
            components={} if pipe is None else component_bytes(pipe.components),
            compiled={**applied.counters("compile"), **applied.counters("vae")},
            quantised=applied.counters("quantize"),
            graphs=applied.counters("graphs"),
            ulysses="" if applied.team is None else applied.team.carrier,
        )

    @property
    def are_paused(self) -> bool:
        """Whether this thread is inside `paused`."""
        return id(self) in _paused.get()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, calls of this thread run stock."""
        with assigned(_paused, _paused.get() | {id(self)}), no_call():
            yield

    def profiled(self) -> contextlib.AbstractContextManager[None]:
        """Inside, spans know the peak memory of each stage."""
        return assigned(_profiled, True)


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive, so that no cycle delays the freeing of a dropped pipeline."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        target = reference()
        if target is None:
            raise PipeboostError("the acceleration of this pipeline is gone; call accelerate_pipeline again")
        return target(*args, **kwargs)

    return call
