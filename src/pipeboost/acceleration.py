"""The one line, `accelerate_pipeline`, and the handle it leaves at `pipe.acceleration`.

This is the only place where the features meet. They are applied to each transformer in this order, and undone in
reverse:

1. attention: the innermost change, a kernel inside the blocks' own processors;
2. parallel: shards what attention then sees, so it comes before anything that captures shapes;
3. quantize: replaces linears, which must happen before a graph of them exists;
4. cache: decides which blocks run, and must call blocks that compile can still stand in front of;
5. compile: captures what the blocks have become, and CUDA graphs what the forward has;
6. offload: moves finished modules;
7. reuse: stands before the encoders, whatever they have become;
8. stages: the outermost layers, which watch everything above.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from pipeboost.attention import rebind_attention, swap_attention, trim_padded_text
from pipeboost.cache import attach_cache
from pipeboost.call import Call, current_call, no_call, open_call
from pipeboost.compile import CompiledModel, Graphs, capture_graphs, compile_model
from pipeboost.config import AccelerationConfig, resolve_config
from pipeboost.distributed import busy, tell_stage
from pipeboost.distributed.beside import Beside
from pipeboost.errors import PipeboostError, UnsupportedError
from pipeboost.families import GENERIC, family_of
from pipeboost.hardware import detect_hardware, device_of
from pipeboost.ledger import Ledger
from pipeboost.offload import execution_device, place, placed_components, residing, stock_offload
from pipeboost.parallel import apart
from pipeboost.plan import Plan, facts_of, make_plan
from pipeboost.quality import Verification, verify_acceleration
from pipeboost.reuse import PromptReuse, reuse_prompts
from pipeboost.seams import attach, stock_class
from pipeboost.stages import (
    COMPOSITION,
    ERRANDS,
    RECORDER,
    TEXT_ENCODING,
    TRAJECTORY_ARGUMENT,
    TURN,
    WHOLE_CALL,
    Composition,
    Errands,
    FinishedCall,
    Progress,
    Recorder,
    Report,
    Serving,
    Stage,
    StageParallelism,
    asking,
    current_turn,
    follow_trajectory,
    latest_after,
    one_by_one,
    overlapped,
    unreported,
    watch,
    watched_components,
    weights_of,
    with_trajectory,
    with_what_finished,
)
from pipeboost.team import Team, to_own_device

P = TypeVar("P")

_CALL_DOOR_ORDER = -1000.0
_paused: ContextVar[frozenset[int]] = ContextVar("pipeboost_paused", default=frozenset())
_profiled: ContextVar[bool] = ContextVar("pipeboost_profiled", default=False)
_listed: ContextVar[tuple[inspect.BoundArguments, ...] | None] = ContextVar("pipeboost_listed", default=None)
"""The arguments of all requests, in a thread that runs one of a list on a mesh with ranks beside it."""
_call_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_call_locks_lock = threading.Lock()


@dataclass(frozen=True)
class _Part:
    """One component of the pipeline, or of a view of it, and what was done to it.

    It holds the component weakly: what the pipeline drops must free its memory at once.
    """

    path: str
    target: weakref.ref[Any]
    ledger: Ledger
    compiled: CompiledModel | None
    graphs: Graphs | None
    of_view: bool


class _Default:
    """Stands for an argument the user did not give, so that a config object or file can win over it."""

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        return repr(self._shown)


_AUTO: Any = _Default("auto")
_LOSSLESS: Any = _Default("lossless")


def accelerate_pipeline(
    pipe: P,
    *,
    quality: Any = _LOSSLESS,
    attention: Any = _AUTO,
    parallel: Any = _AUTO,
    cache: Any = _AUTO,
    compile: Any = _AUTO,
    quantize: Any = _AUTO,
    offload: Any = _AUTO,
    reuse: Any = _AUTO,
    config: Any = None,
) -> P:
    """Accelerate a stock Diffusers pipeline in place and return the same object.

    Args:
        pipe: any Diffusers pipeline with a transformer, on the device it will run on.
        quality: the tier, which bounds how far outputs may move from stock: `"exact"` (bit-identical), `"lossless"`
            (the default: rounding only), `"balanced"` (8-bit attention), `"fast"` (step caching).
        attention, parallel, cache, compile, quantize, offload, reuse: `"auto"` (the default) lets the plan choose; None
            or False turns the feature off; a short name (`"flash3"`, `"regional"`) or the feature's dataclass fixes it.
        config: an `AccelerationConfig` or the path of a YAML/JSON file; the keyword arguments win over it, and it wins
            over `PIPEBOOST_*` environment variables.

    Returns:
        `pipe`, with the handle at `pipe.acceleration`. A pipeline that was accelerated already is accelerated anew.

    Raises:
        PipeboostError: something cannot be done as asked. The pipeline is then as it was before.
    """
    given = {
        name: value
        for name, value in {
            "quality": quality,
            "attention": attention,
            "parallel": parallel,
            "cache": cache,
            "compile": compile,
            "quantize": quantize,
            "offload": offload,
            "reuse": reuse,
        }.items()
        if not isinstance(value, _Default)
    }
    settings = resolve_config(config, given)
    if settings.parallel is not None:
        to_own_device(pipe)
    plan = _plan_for(pipe, settings)
    previous = vars(pipe).get("acceleration")
    if isinstance(previous, Acceleration):
        if not previous.accelerates(pipe):
            raise UnsupportedError(
                "this pipeline is a shallow copy of an accelerated one and shares its acceleration; accelerate the "
                "original, or a copy.deepcopy"
            )
        previous.remove()
    try:
        Acceleration(pipe, plan, settings)
    except Exception:
        if isinstance(previous, Acceleration):
            Acceleration(pipe, previous.plan, previous.config)
        raise
    return pipe


class Acceleration:
    """What `accelerate_pipeline` did to one pipeline, and the way to look at it and to undo it.

    Attributes:
        plan: what was decided and why; print it.
        config: the settings it was made from.
        stages: the stages of a call, in order; print them.
        progress: called with a `Progress` at the start of each stage and after each denoising step; None to leave it.
            What it raises ends the call.
    """

    def __init__(self, pipe: Any, plan: Plan, config: AccelerationConfig) -> None:
        self.plan = plan
        self.config = config
        self.stages = Composition(plan.family, pipe)
        self.progress: Callable[[Progress], None] | None = None
        self._pipe = weakref.ref(pipe)
        self._ledger = Ledger()
        self._parts: dict[int, _Part] = {}
        self._calls: set[Call] = set()
        self._cancellations = 0
        self._finished: FinishedCall | None = None
        self._lock = threading.RLock()
        self._removed = False
        self._prompts: PromptReuse | None = None
        self._team: Team | None = None
        self._list_runs = False
        self._failed_in: str | None = None
        with self._ledger:
            self._ledger.record("ranks", _weakly(self._leave_team))
            self._join_team(pipe, plan)
            if plan["reuse"].on:
                self._prompts = PromptReuse(plan["reuse"].settings, owner=self, denoisers=plan.family.denoisers)
                self._ledger.record("kept prompts", self._prompts.clear)
            self._ledger.record("components", _weakly(self._undo_all_parts))
            self._bind_on_all_ranks(pipe, "accelerate_pipeline")
            self._ledger.add_layer(pipe, "__call__", _weakly(self._run), order=_CALL_DOOR_ORDER)
            attach(pipe, "acceleration", self)
            self._ledger.record("pipe.acceleration", _weakly(self._detach))

    def __repr__(self) -> str:
        state = "removed" if self._removed else "active"
        return f"<Acceleration of {self.plan.facts.pipeline}, quality={self.plan.quality!r}, {state}>"

    def accelerates(self, pipe: Any) -> bool:
        """Whether this is the acceleration of `pipe` itself, not of a pipeline that `pipe` is a shallow copy of."""
        return self._pipe() is pipe

    def report(self) -> Report:
        """Where the time of the latest finished call went.

        Raises:
            PipeboostError: no call has finished yet.
        """
        if self._finished is None:
            raise PipeboostError("there is nothing to report yet: call the pipeline first")
        pipe = self._pipe()
        return self._finished.report(
            pipeline=self.plan.facts.pipeline,
            components={} if pipe is None else weights_of(pipe.components),
            compiled={
                part.path: asdict(part.compiled.counters) for part in self._parts.values() if part.compiled is not None
            },
            graphs={part.path: part.graphs.summary() for part in self._parts.values() if part.graphs is not None},
        )

    def add_stage(self, name: str, stage: Stage, *, before: str | None = None, after: str | None = None) -> None:
        """Put a stage of your own right before or right after another one; from the next call on.

        Args:
            name: what reports call it.
            stage: an instance of a subclass of `Stage`.
            before, after: name of the other stage; one of the two.

        Raises:
            ConfigurationError: the name is taken, there is no such place, or nothing can stand there.
            UnsupportedError: not a `Stage`, or one whose parallelism does not run yet.
        """
        self._alive_pipe()
        self.stages.add(name, stage, before=before, after=after)

    def replace_stage(self, name: str, stage: Stage) -> None:
        """Put a stage of your own in the place of another; it keeps the name. From the next call on.

        The stage that replaces a built-in one gets its arguments by name and returns its results by name; kept before,
        `pipe.acceleration.stages[name].run(values)` does the stock work from inside it.

        Raises:
            ConfigurationError: there is no such stage, or it is the script's own: `"denoising"`, `"other"`.
            UnsupportedError: not a `Stage`, or one whose parallelism does not run yet.
        """
        self._alive_pipe()
        self.stages.replace(name, stage)

    def remove_stage(self, name: str) -> None:
        """Take out a stage of your own; where it had replaced a built-in one, that one is back.

        Raises:
            ConfigurationError: there is no such stage, or it is a built-in one.
        """
        self.stages.remove(name)

    def run_many(self, requests: Sequence[Mapping[str, Any]], *, overlap: bool = True) -> Iterator[Any]:
        """Run `pipe(**request)` for each request and yield what they return, in order.

        While two denoise, the text of the next is encoded and the previous is decoded; where ranks are beside a mesh,
        they do that while the mesh denoises one. The results are those of one call after the other, to the bit. They do
        run one after the other where that would not hold (a request without a `generator` of its own), where components
        are offloaded, and on several ranks with none beside them. After each output `report()` is of its request.

        Args:
            requests: arguments of each call.
            overlap: False runs them one after the other.

        Raises:
            PipeboostError: the acceleration was removed. What a request raises comes up in its turn; the requests after
                it are not run.
        """
        pipe = self._alive_pipe()
        team, here = self._team, not self._removed and id(self) not in _paused.get()
        if overlap and here and team is not None and team.beside is not None and self._overlaps_beside(pipe, requests):
            yield from self._run_beside(pipe, requests)
            return
        alone = self.plan["offload"].on or team is not None
        together = overlap and len(requests) > 1 and not alone and one_by_one(requests) is None
        if not together or not here:
            for request in requests:
                yield pipe(**request)
            return
        for output, finished in overlapped(pipe, requests, with_what_finished, self._cancel_turns):
            self._finished = finished or self._finished
            yield output

    def _overlaps_beside(self, pipe: Any, requests: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these requests overlap on a mesh with ranks beside it, as the first rank says."""
        team = self._team
        assert team is not None
        self._require_no_list()
        self._follow_device(pipe)
        against = {
            "there is only one": len(requests) < 2,
            "components are offloaded": self.plan["offload"].on,
            "ranks exchange something in a stage outside the loop": self.stages.meets_outside_the_loop,
            "ranks ask each other after each callback whether one has interrupted the call": any(
                request.get("callback_on_step_end") is not None for request in requests
            ),
        }
        reason = next((words for words, holds in against.items() if holds), one_by_one(requests))
        with team.watched(_weakly(self._stage_now)):
            return team.agreed_to_overlap(len(requests), reason)

    def _run_beside(self, pipe: Any, requests: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
        """`run_many` on a mesh with ranks beside it: one loop at a time, so that all ranks go through them alike."""
        team, signature = self._team, _signature(stock_class(pipe))
        assert team is not None
        assert team.beside is not None
        serving = None if team.mesh is not None else Serving(team.beside)
        self._list_runs, self._failed_in = True, None
        try:
            excusing = contextlib.nullcontext() if serving is None else serving.excusing()
            with excusing, team.watched(_weakly(self._stage_now)):
                self._bind_on_all_ranks(pipe, "the start of run_many")
                given = [_without_trajectory(signature, request)[0] for request in requests]
                bound = [team.agreed(signature, pipe, (), request) for request in given]
                outputs = self._asked(pipe, requests, bound) if serving is None else self._served(pipe, serving, bound)
                with asking(team.beside) if serving is None else contextlib.nullcontext():
                    for output in outputs:
                        try:
                            yield output
                        except GeneratorExit:  # on every rank; the requests that are under way come to their end
                            outputs.close()
                            break
        finally:
            self._list_runs = False
        if serving is not None:
            serving.raise_what_was_told()

    def _asked(
        self, pipe: Any, requests: Sequence[Mapping[str, Any]], bound: Sequence[inspect.BoundArguments]
    ) -> Generator[Any]:
        """The results of requests on a rank of the mesh."""

        def run(view: Any, request: Mapping[str, Any]) -> Any:
            token = _listed.set(tuple(bound))
            try:
                return with_what_finished(view, request)
            finally:
                _listed.reset(token)

        results = overlapped(pipe, requests, run, self._cancel_turns, at_once=1, together=True)
        with contextlib.closing(results):
            for output, finished in results:
                self._finished = finished or self._finished
                yield output

    def _served(self, pipe: Any, serving: Serving, bound: Sequence[inspect.BoundArguments]) -> Generator[Any]:
        """The results of requests on a rank beside, up to one that has failed on the mesh."""
        device = self._follow_device(pipe)
        with ThreadPoolExecutor(1, thread_name_prefix="pipeboost-serving") as pool:
            work = pool.submit(self._serve, pipe, device, serving)
            try:
                for position, each in enumerate(bound):
                    if not serving.has_returned(position):
                        break
                    yield serving.outcome(position, dict(each.arguments), alone=False)
            finally:
                work.result()

    def _serve(self, pipe: Any, device: torch.device, serving: Serving) -> None:
        """Do what a mesh asks of a rank beside it, until it is done."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with self._opened(pipe, {}, device) as call, call.state[RECORDER].span(WHOLE_CALL):
            serving.run(call)
        self._finished = latest_after(call, self._finished)

    def _require_no_list(self) -> None:
        if self._list_runs:
            raise PipeboostError(
                "run_many is under way on these ranks, so that no other call has its turn; take its last output first"
            )

    def warm_up(self, **call: Any) -> None:
        """Run `pipe(**call)` without reporting it, so that what comes after is compiled and loaded."""
        with unreported():
            self._alive_pipe()(**call)

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """Inside, a report knows the peak memory of each stage. Restarts torch's peak counter at every stage."""
        token = _profiled.set(True)
        try:
            yield
        finally:
            _profiled.reset(token)

    def verify(self, **call: Any) -> Verification:
        """Run `pipe(**call)` stock and accelerated, and check the promise of the tier.

        Without a `generator` in `call`, both runs get one with seed 0; a given one is rewound for each run and left as
        it was.

        Raises:
            PipeboostError: the acceleration was removed.
        """
        pipe = self._alive_pipe()
        return verify_acceleration(
            pipe,
            call,
            quality=self.plan.quality,
            denoisers=self.plan.family.models(pipe),
            paused=self.paused,
            opened=self.open,
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside this context the pipeline runs stock in this thread; calls of other threads stay accelerated."""
        token = _paused.set(_paused.get() | {id(self)})
        try:
            with no_call():
                yield
        finally:
            _paused.reset(token)

    @contextlib.contextmanager
    def open(self) -> Iterator[Call]:
        """Run the pipeline's transformers directly, accelerated, without its script: inside, a call is open."""
        pipe = self._alive_pipe()
        device = self._follow_device(pipe)
        self._bind_on_all_ranks(pipe, "open()")
        with self._opened(pipe, {}, device) as call, apart(call):
            yield call

    def cancel(self, call: Call | None = None) -> None:
        """Make all calls that run or wait for their turn, or one, raise `Cancelled` at their next denoising step."""
        if call is None:
            self._cancellations += 1
        for running in tuple(self._calls):
            if call is None or running is call:
                running.cancel()

    def remove(self) -> None:
        """Make the pipeline stock again, to the bit; what the user changed meanwhile stays. Harmless when repeated.

        Raises:
            PipeboostError: a call is running.
        """
        with self._lock:
            if self._calls:
                raise PipeboostError("a call of this pipeline is running; wait for it, or cancel() it, then remove()")
            self._removed = True
        self.stages.offload()
        self._ledger.undo()

    def _alive_pipe(self) -> Any:
        pipe = self._pipe()
        if self._removed:
            raise PipeboostError("this acceleration was removed; call accelerate_pipeline again")
        if pipe is None:
            raise PipeboostError("the pipeline that was accelerated is gone; only shallow copies of it are left")
        return pipe

    def _run(self, call_next: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer on the pipeline's own `__call__`: binds what the user has replaced, and opens the call."""
        if self._removed or id(self) in _paused.get():
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
            if self._removed:  # while this call waited
                return functools.partial(self._run, call_next, pipe, *args, **kwargs)
            signature = _signature(stock_class(pipe))
            kwargs, wants_trajectory = _without_trajectory(signature, kwargs)
            device = self._follow_device(pipe)
            team = self._team
            if team is not None and team.beside is not None and team.mesh is None:
                return self._serve_one(pipe, device, team.beside, signature, args, kwargs)
            with self._agreed(pipe, signature, args, kwargs) as bound:
                if team is not None:
                    args, kwargs = bound.args[1:], bound.kwargs
                bound.apply_defaults()
                arguments = dict(bound.arguments)
                with self._errands(arguments) as errands, self._opened(pipe, arguments, device) as call:
                    if errands is not None:
                        call.state[ERRANDS] = errands
                    if self._cancellations != cancellations:  # while this call waited
                        call.cancel()
                    call.raise_if_cancelled()
                    if self.plan.family.name != GENERIC:
                        self.stages.verify_arguments(arguments)
                    trajectory = follow_trajectory(call) if wants_trajectory else None
                    with call.state[RECORDER].span(WHOLE_CALL):
                        result = call_next(*args, **kwargs)
                    if trajectory is not None:
                        result = with_trajectory(result, trajectory)
                    if errands is not None:
                        errands.returned(result)
        self._finished = latest_after(call, self._finished)
        return lambda: result

    def _serve_one(
        self, pipe: Any, device: torch.device, beside: Beside, signature: inspect.Signature, args: Any, kwargs: Any
    ) -> Callable[[], Any]:
        """A call on a rank beside a mesh; what comes of it, returned or raised."""
        serving = Serving(beside)
        with serving.excusing(), self._agreed(pipe, signature, args, kwargs) as bound:
            arguments = dict(bound.arguments)
            self._serve(pipe, device, serving)
            serving.has_returned(0)
        return lambda: serving.outcome(0, arguments, alone=True)

    @contextlib.contextmanager
    def _agreed(
        self, pipe: Any, signature: inspect.Signature, args: Any, kwargs: Any
    ) -> Iterator[inspect.BoundArguments]:
        """The arguments of a call, which its ranks agree on; inside, they watch each other."""
        team, listed, turn, outer = self._team, _listed.get(), current_turn(), current_call()
        if team is not None and listed is not None and turn is not None and outer is None:
            # One of a list, which is watched as a whole, and whose ranks have agreed on all of it.
            self._bind(pipe)
            bound = listed[turn.position]
            yield signature.bind(pipe, *bound.args[1:], **bound.kwargs)
            return
        if team is not None and team.beside is not None:
            self._require_no_list()
            if outer is not None and ERRANDS in outer.state:
                raise UnsupportedError(
                    "a call inside a call has no ranks beside it, which are at the outer one; make it afterwards, or "
                    "use ParallelConfig(beside=0)"
                )
        with contextlib.nullcontext() if team is None else team.watched(_weakly(self._stage_now)):
            self._bind_on_all_ranks(pipe, "the call's start")
            yield signature.bind(pipe, *args, **kwargs) if team is None else team.agreed(signature, pipe, args, kwargs)

    @contextlib.contextmanager
    def _errands(self, arguments: dict[str, Any]) -> Iterator[Errands | None]:
        """What ranks beside the mesh do for a call; None where there are none."""
        beside = None if self._team is None else self._team.beside
        if beside is None:
            yield None
            return
        turn = None if _listed.get() is None else current_turn()
        errands = Errands(beside, 0 if turn is None else turn.position, alone=turn is None)
        with contextlib.nullcontext() if turn is not None else asking(beside), errands.request(arguments):
            yield errands

    @contextlib.contextmanager
    def _opened(self, pipe: Any, arguments: dict[str, Any], device: torch.device) -> Iterator[Call]:
        mesh = None if self._team is None else self._team.mesh
        features = frozenset(decision.feature for decision in self.plan.decisions if decision.on)
        outer = current_call()
        with open_call(pipe, owner=self, arguments=arguments, features=features, device=device, mesh=mesh) as call:
            with self._lock:
                if self._removed:
                    raise PipeboostError("this acceleration was removed while the call was starting")
                self._calls.add(call)
            call.watched = None if self._team is None else self._team.everyone
            call.rebind = functools.partial(self._bind, pipe)
            call.state[COMPOSITION] = self.stages
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
                with self._lock:
                    self._calls.discard(call)
                    if self.plan["offload"].on and not self._calls:
                        self.stages.offload()

    def _stage_now(self) -> str:
        """Where the running call is; asked by the thread that watches the ranks."""
        if self._list_runs and self._failed_in is not None:
            return self._failed_in
        # Of several requests, the earliest.
        calls = sorted(self._calls.copy(), key=lambda call: call.state[TURN].position if TURN in call.state else -1)
        recorders = [call.state.get(RECORDER) for call in calls]
        return next((recorder.stage for recorder in recorders if recorder is not None), "the call's start")

    def _cancel_turns(self, turns: Any) -> None:
        for call in tuple(self._calls):
            turn = call.state.get(TURN)
            if turn is not None and turn.turns is turns:
                call.cancel()

    def _follow_device(self, pipe: Any) -> torch.device:
        """Plan anew where the pipeline was moved to another kind of device since, as `pipe.to("cuda")` does.

        So it is where Diffusers' own offload was turned on since: ours steps back.

        Returns:
            Where the call will run.
        """
        device = device_of(pipe)
        with self._lock:
            taken_over = self.plan["offload"].on and stock_offload(pipe)
            unmoved = device.type == self.plan.hardware.device
            if (unmoved and not taken_over) or self._calls or pipe is not self._pipe():
                return device
            plan = _plan_for(pipe, replace(self.config, offload=None) if taken_over else self.config)
            self._undo_all_parts()
            self._leave_team()
            self._join_team(pipe, plan)
            self.plan = plan
        return device_of(pipe)

    def _join_team(self, pipe: Any, plan: Plan) -> None:
        """Form the plan's team with the other ranks; each of them is at this point of its program."""
        if plan["parallel"].on:
            self._team = Team(pipe, plan)
            if self._team.text_encoders and TEXT_ENCODING in self.stages:
                self.stages[TEXT_ENCODING].parallelism = StageParallelism.TENSOR_PARALLEL
            self.stages.work_beside(beside=self._team.beside is not None)

    def _leave_team(self) -> None:
        if self._team is not None:
            self._team.leave()
            self.stages.work_beside(beside=False)
            if self._team.text_encoders and TEXT_ENCODING in self.stages:
                self.stages[TEXT_ENCODING].parallelism = StageParallelism.MAIN_RANK
        self._team = None

    def _bind_on_all_ranks(self, pipe: Any, doing: str) -> None:
        """As `_bind`; an error on one rank is an error on all, and what was bound is stock again on all.

        Raises:
            Exception: what this rank has raised.
            RankFailedError: another rank has raised something.
        """
        team = self._team
        if team is None:
            self._bind(pipe)
            return
        before = dict(self._parts)
        with team.watched(lambda: doing):
            try:
                with team.all_or_none(doing):
                    self._bind(pipe)
            except BaseException:
                for key in reversed(tuple(self._parts)):
                    if self._parts[key] is not before.get(key):
                        self._undo_part(key)
                raise

    def _bind(self, pipe: Any) -> None:
        """Stand in the doors of what `pipe` consists of now; cheap when nothing was replaced since the last call."""
        models = self.plan.family.models(pipe)
        components: dict[str, Any] = watched_components(pipe, self.plan.family)
        if self.plan["offload"].on:
            components |= placed_components(pipe)
        team = self._team
        if team is not None:
            components |= team.components(pipe)
        with self._lock:
            if self._removed:
                return
            for key, part in tuple(self._parts.items()):
                target = part.target()
                replaced = pipe is self._pipe() and not part.of_view and components.get(part.path) is not target
                # A view may be in the middle of a call with what the pipeline itself has given up.
                if target is None or (replaced and not self._calls):
                    self._undo_part(key)
            for path, obj in components.items():
                known = self._parts.get(id(obj))
                if known is not None and known.target() is obj:
                    if path in models and self.plan["attention"].on:
                        rebind_attention(models[path])
                        if team is not None:
                            team.refuse_stock_processors(models[path])
                    continue
                part = self._apply(path, obj, denoiser=path in models, of_view=pipe is not self._pipe())
                if part.ledger.changes:
                    self._parts[id(obj)] = part

    def _apply(self, path: str, obj: Any, *, denoiser: bool, of_view: bool) -> _Part:
        """Apply the plan to one component, features in the order that this module's docstring explains."""
        plan, compiled, team = self.plan, None, self._team
        graphs: Graphs | None = None
        with Ledger() as ledger, contextlib.nullcontext() if team is None else team.telling():
            if denoiser and plan["attention"].on:
                swap_attention(
                    obj,
                    plan["attention"].settings,
                    ledger,
                    tier=plan.quality,
                    hardware=plan.hardware,
                    right_padded=plan.family.padded_text is not None and (team is None or team.across is None),
                    across=None if team is None else team.across,
                )
                trim_padded_text(obj, plan.family, ledger, at_least=1 if team is None else team.token_ranks)
            if team is not None:
                if denoiser:
                    team.refuse_stock_processors(obj)
                team.share(path, obj, ledger, owner=self)
            if denoiser and plan["cache"].on:
                position = plan.family.denoisers.index(path)
                attach_cache(obj, plan["cache"].settings, plan.family, ledger, owner=self, position=position)
            if denoiser and plan["compile"].on:
                compiled = compile_model(obj, plan["compile"].settings, plan.family, ledger, owner=self)
            if denoiser and plan["graphs"].on:
                graphs = capture_graphs(obj, plan["graphs"].settings, ledger, owner=self)
            if plan["offload"].on:
                with busy("placing weights"):
                    place(path, obj, plan["offload"].settings, plan.family, ledger)
            if not path and self._prompts is not None:
                reuse_prompts(obj, self._prompts, ledger)
            watch(path, obj, plan.family, ledger)
        return _Part(path, weakref.ref(obj), ledger, compiled, graphs, of_view)

    def _detach(self) -> None:
        pipe = self._pipe()
        if pipe is not None and vars(pipe).get("acceleration") is self:
            del pipe.acceleration

    def _undo_part(self, key: int) -> None:
        self._parts.pop(key).ledger.undo()

    def _undo_all_parts(self) -> None:
        for key in reversed(tuple(self._parts)):
            self._undo_part(key)


def _plan_for(pipe: Any, config: AccelerationConfig) -> Plan:
    family = family_of(pipe)
    device = execution_device(pipe, config.offload)
    return make_plan(config, detect_hardware(device), family, facts_of(pipe, family, device))


def _alone_with(pipe: Any) -> threading.RLock:
    """The lock of a pipeline's scheduler, whose state a call goes through: calls that share one run in turn."""
    with _call_locks_lock:
        return _call_locks.setdefault(getattr(pipe, "scheduler", None) or pipe, threading.RLock())


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive, so that no cycle delays the freeing of a dropped pipeline."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        target = reference()
        if target is None:
            raise PipeboostError("the acceleration of this pipeline is gone; call accelerate_pipeline again")
        return target(*args, **kwargs)

    return call


def _without_trajectory(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A call's arguments without the one that is ours, and what that said."""
    if TRAJECTORY_ARGUMENT in signature.parameters:
        return dict(kwargs), False
    rest = dict(kwargs)
    return rest, rest.pop(TRAJECTORY_ARGUMENT, False)


@functools.cache
def _signature(pipeline_class: type) -> inspect.Signature:
    return inspect.signature(pipeline_class.__call__)
