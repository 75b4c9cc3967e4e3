"""`Calls`: how a call of an accelerated pipeline is made, on each rank that has a part in it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from pipeboost.applied import AppliedPlan
from pipeboost.contract.call import Call, current_call, no_call, open_call
from pipeboost.core.errors import PipeboostError, UnsupportedError
from pipeboost.core.seams import stock_class
from pipeboost.distributed import tell_stage
from pipeboost.distributed.beside import Beside
from pipeboost.features.offload import residing
from pipeboost.features.parallel.rank_team import Team
from pipeboost.stages import (
    COMPOSITION,
    ERRANDS,
    RECORDER,
    TURN,
    WHOLE_CALL,
    Errands,
    FinishedCall,
    Progress,
    Recorder,
    Serving,
    asking,
    current_turn,
    follow_trajectory,
    latest_after,
    with_trajectory,
    without_trajectory,
)
from pipeboost.stages.admission import Turns

_paused: ContextVar[frozenset[int]] = ContextVar("pipeboost_paused", default=frozenset())
_profiled: ContextVar[bool] = ContextVar("pipeboost_profiled", default=False)
_listed: ContextVar[Sequence[inspect.BoundArguments] | None] = ContextVar("pipeboost_listed", default=None)
"""The arguments of all requests, in a thread that runs one of a list on a mesh with ranks beside it."""
_call_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_call_locks_lock = threading.Lock()


class Calls:
    """The calls of one accelerated pipeline, and of views of it.

    Args:
        applied: what they run with.

    Attributes:
        progress: told of each stage and denoising step; None where nobody is.
        finished: the latest call that has ended, for a report.
    """

    def __init__(self, applied: AppliedPlan) -> None:
        self.applied = applied
        self.progress: Callable[[Progress], None] | None = None
        self.finished: FinishedCall | None = None
        self._cancellations = 0
        self._list_runs = False
        self._failed_in: str | None = None

    def run(self, call_next: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer on the pipeline's own `__call__`: binds what the user has replaced, and opens the call."""
        if self.applied.removed or self.are_paused:
            with no_call(), residing(pipe):
                return call_next(*args, **kwargs)
        # On a rank beside, what the mesh has raised is raised out here: it is no error of this rank.
        return self._result_of(call_next, pipe, args, kwargs)()

    def _result_of(
        self, call_next: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[], Any]:
        """Make a call; what comes of it, returned or raised."""
        cancellations = self._cancellations
        with _alone_with(pipe):
            if self.applied.removed:  # while this call waited
                return functools.partial(self.run, call_next, pipe, *args, **kwargs)
            signature = signature_of(pipe)
            kwargs, wants_trajectory = without_trajectory(signature, kwargs)
            device = self.applied.follow_device(pipe)
            team = self.applied.team
            if team is not None and team.beside is not None and team.mesh is None:
                return self._serve_one(pipe, device, team.beside, signature, args, kwargs)
            with self._agreed(pipe, signature, args, kwargs) as bound:
                if team is not None:
                    args, kwargs = bound.args[1:], bound.kwargs
                bound.apply_defaults()
                arguments = dict(bound.arguments)
                with self._errands(arguments) as errands, self.opened(pipe, arguments, device) as call:
                    if errands is not None:
                        call.state[ERRANDS] = errands
                    if self._cancellations != cancellations:  # while this call waited
                        call.cancel()
                    call.raise_if_cancelled()
                    if self.applied.plan.family.pipelines:
                        self.applied.stages.verify_arguments(arguments)
                    trajectory = follow_trajectory(call) if wants_trajectory else None
                    with call.state[RECORDER].span(WHOLE_CALL):
                        result = call_next(*args, **kwargs)
                    if trajectory is not None:
                        result = with_trajectory(result, trajectory)
                    if errands is not None:
                        errands.returned(result)
        self.finished = latest_after(call, self.finished)
        return lambda: result

    def _serve_one(
        self, pipe: Any, device: torch.device, beside: Beside, signature: inspect.Signature, args: Any, kwargs: Any
    ) -> Callable[[], Any]:
        """A call on a rank beside a mesh; what comes of it, returned or raised."""
        serving = Serving(beside)
        with serving.excusing(), self._agreed(pipe, signature, args, kwargs) as bound:
            arguments = dict(bound.arguments)
            self.serve(pipe, device, serving)
            serving.has_returned(0)
        return lambda: serving.outcome(0, arguments, alone=True)

    def serve(self, pipe: Any, device: torch.device, serving: Serving) -> None:
        """Do what a mesh asks of a rank beside it, until it is done."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with self.opened(pipe, {}, device) as call, call.state[RECORDER].span(WHOLE_CALL):
            serving.run(call)
        self.finished = latest_after(call, self.finished)

    @contextlib.contextmanager
    def _agreed(
        self, pipe: Any, signature: inspect.Signature, args: Any, kwargs: Any
    ) -> Iterator[inspect.BoundArguments]:
        """The arguments of a call, which its ranks agree on; inside, they watch each other."""
        team, listed, turn, outer = self.applied.team, _listed.get(), current_turn(), current_call()
        if team is not None and listed is not None and turn is not None and outer is None:
            # One of a list, which is watched as a whole, and whose ranks have agreed on all of it.
            self.applied.bind(pipe)
            bound = listed[turn.position]
            yield signature.bind(pipe, *bound.args[1:], **bound.kwargs)
            return
        if team is not None and team.beside is not None:
            self.require_no_list()
            if outer is not None and ERRANDS in outer.state:
                raise UnsupportedError(
                    "a call inside a call has no ranks beside it, which are at the outer one; make it afterwards, or "
                    "use ParallelConfig(beside=0)"
                )
        with contextlib.nullcontext() if team is None else self.watched(team):
            self.applied.bind_on_all_ranks(pipe, "the call's start")
            yield signature.bind(pipe, *args, **kwargs) if team is None else team.agreed(signature, pipe, args, kwargs)

    @contextlib.contextmanager
    def _errands(self, arguments: dict[str, Any]) -> Iterator[Errands | None]:
        """What ranks beside the mesh do for a call; None where there are none."""
        beside = None if self.applied.team is None else self.applied.team.beside
        if beside is None:
            yield None
            return
        turn = None if _listed.get() is None else current_turn()
        errands = Errands(beside, 0 if turn is None else turn.position, alone=turn is None)
        with contextlib.nullcontext() if turn is not None else asking(beside), errands.request(arguments):
            yield errands

    @contextlib.contextmanager
    def opened(self, pipe: Any, arguments: dict[str, Any], device: torch.device) -> Iterator[Call]:
        """Inside, a call is open on this rank."""
        applied, outer = self.applied, current_call()
        mesh = None if applied.team is None else applied.team.mesh
        features = frozenset(decision.feature for decision in applied.plan.decisions if decision.on)
        with (
            open_call(pipe, owner=applied, arguments=arguments, features=features, device=device, mesh=mesh) as call,
            applied.used_by(call),
        ):
            call.watched = None if applied.team is None else applied.team.everyone
            call.rebind = functools.partial(applied.bind, pipe)
            call.state[COMPOSITION] = applied.stages
            call.state[RECORDER] = Recorder(call, exact_peaks=_profiled.get(), progress=self.progress)
            turn = current_turn()
            if turn is not None and (outer is None or outer.state.get(TURN) is not turn):
                call.state[TURN] = turn
            try:
                with residing(pipe):
                    yield call
            except Exception:
                if TURN in call.state and mesh is not None and call.events:  # others go on, and tell where they are
                    self._failed_in = self._failed_in or call.events[-1].stage
                    tell_stage(mesh)
                raise
            finally:
                # The recorder knows its call: without this cycle a dropped pipeline frees its memory at once.
                call.state.pop(RECORDER)

    def cancel(self, call: Call | None = None) -> None:
        """Make all calls that run or wait for their turn, or one, raise `Cancelled` at their next denoising step."""
        if call is None:
            self._cancellations += 1
        for running in tuple(self.applied.running):
            if call is None or running is call:
                running.cancel()

    def cancel_turns(self, turns: Turns) -> None:
        """Cancel the calls that run in these turns."""
        for call in tuple(self.applied.running):
            if TURN in call.state and call.state[TURN].turns is turns:
                call.cancel()

    @property
    def are_paused(self) -> bool:
        """Whether this thread is inside `paused`."""
        return id(self) in _paused.get()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, calls of this thread run stock."""
        token = _paused.set(_paused.get() | {id(self)})
        try:
            with no_call():
                yield
        finally:
            _paused.reset(token)

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """Inside, spans know the peak memory of each stage."""
        token = _profiled.set(True)
        try:
            yield
        finally:
            _profiled.reset(token)

    @contextlib.contextmanager
    def a_list(self) -> Iterator[None]:
        """Around a list of requests on a mesh with ranks beside it, where no other call has its turn meanwhile."""
        self._list_runs, self._failed_in = True, None
        try:
            yield
        finally:
            self._list_runs = False

    def require_no_list(self) -> None:
        """Refuse what `a_list` leaves no turn for.

        Raises:
            PipeboostError: a list is under way.
        """
        if self._list_runs:
            raise PipeboostError(
                "run_many is under way on these ranks, so that no other call has its turn; take its last output first"
            )

    def watched(self, team: Team) -> contextlib.AbstractContextManager[None]:
        """Inside, the ranks watch each other, and tell where the call is."""
        return team.watched(weakly(self._stage_now))

    def _stage_now(self) -> str:
        """Where the running call is; asked by the thread that watches the ranks."""
        if self._list_runs and self._failed_in is not None:
            return self._failed_in
        # Of several requests, the earliest.
        running = self.applied.running.copy()
        calls = sorted(running, key=lambda call: call.state[TURN].position if TURN in call.state else -1)
        recorders = [call.state.get(RECORDER) for call in calls]
        return next((recorder.stage for recorder in recorders if recorder is not None), "the call's start")


@contextlib.contextmanager
def one_of_a_list(bound: Sequence[inspect.BoundArguments]) -> Iterator[None]:
    """Inside, this thread's call is one of a list; `bound` are the arguments of all, which its ranks agree on."""
    token = _listed.set(bound)
    try:
        yield
    finally:
        _listed.reset(token)


def signature_of(pipe: Any) -> inspect.Signature:
    """What the stock pipeline's `__call__` takes."""
    return _signature(stock_class(pipe))


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive, so that no cycle delays the freeing of a dropped pipeline."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        target = reference()
        if target is None:
            raise PipeboostError("the acceleration of this pipeline is gone; call accelerate_pipeline again")
        return target(*args, **kwargs)

    return call


def _alone_with(pipe: Any) -> threading.RLock:
    """The lock of a pipeline's scheduler, whose state a call goes through: calls that share one run in turn."""
    with _call_locks_lock:
        return _call_locks.setdefault(getattr(pipe, "scheduler", None) or pipe, threading.RLock())


@functools.cache
def _signature(pipeline_class: type) -> inspect.Signature:
    return inspect.signature(pipeline_class.__call__)
