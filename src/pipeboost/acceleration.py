"""The one line, `accelerate_pipeline`, and the handle it leaves at `pipe.acceleration`."""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pipeboost.applied_plan import AppliedPlan
from pipeboost.contract.call import Call
from pipeboost.core.config import FEATURES, AccelerationConfig, resolve_config
from pipeboost.core.errors import PipeboostError, UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.locks import Locks
from pipeboost.core.seams import attach
from pipeboost.features.parallel.cfg_parallel import without_cfg_parallel
from pipeboost.plan import Plan, agreed_plan
from pipeboost.quality import Verification, verify_acceleration
from pipeboost.requests import Request, Requests
from pipeboost.runner import Calls, weakly
from pipeboost.stages import Progress, Stage
from pipeboost.stages.call_record import CallRecord, recorded_by
from pipeboost.stages.report import Report
from pipeboost.tune import Tuned, tune

P = TypeVar("P")

_locks = Locks()
"""One pipeline is accelerated, or made stock again, by one thread at a time."""


class _Default(str):
    """An argument that the user did not give, so that a config object or file can win over it."""


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
            (the default: rounding only), `"balanced"` (8-bit linears and attention), `"fast"` (step caching).
        attention, parallel, cache, compile, quantize, offload, reuse: `"auto"` (the default) lets the plan choose; None
            or False turns the feature off; a short name (`"flash3"`, `"regional"`) or the feature's dataclass fixes it.
        config: an `AccelerationConfig` or the path of a YAML/JSON file; the keyword arguments win over it, and it wins
            over `PIPEBOOST_*` environment variables.

    Returns:
        `pipe`, with the handle at `pipe.acceleration`. A pipeline that was accelerated already is accelerated anew.

    Raises:
        PipeboostError: something cannot be done as asked, here or on another rank. The pipeline is as it was before.
    """
    names = ("quality", *FEATURES)
    given = {name: value for name, value in locals().items() if name in names and not isinstance(value, _Default)}
    settings = resolve_config(config, given)
    with _locks.of(pipe):
        previous = getattr(pipe, "__dict__", {}).get("acceleration")
        if not isinstance(previous, Acceleration):
            Acceleration(pipe, agreed_plan(pipe, settings), settings)
            return pipe
        plan = agreed_plan(pipe, settings, lambda: previous._refuse_to_give_way(pipe))
        previous.remove()
        try:
            Acceleration(pipe, plan, settings)
        except Exception:
            Acceleration(pipe, previous.plan, previous.config)
            raise
    return pipe


class Acceleration:
    """What `accelerate_pipeline` did to one pipeline, and the way to look at it and to undo it.

    Attributes:
        config: the settings that the plan was made from.
        stages: the stages of a call, in order; print them.
    """

    def __init__(self, pipe: Any, plan: Plan, config: AccelerationConfig) -> None:
        self.config = config
        self._pipe = weakref.ref(pipe)
        self._of: Acceleration | None = None
        self._ledger = Ledger()
        self._lock = _locks.of(pipe)
        self._applied = AppliedPlan(pipe, plan, config)
        self._calls = Calls(self._applied)
        self._requests = Requests(self._calls)
        self.stages = self._applied.stages
        # The handle comes first and goes last, so that what an interrupt leaves can be removed.
        with self._ledger:
            self._ledger.record("pipe.acceleration", weakly(self._detach))
            self._ledger.add_middleware(pipe, "__call__", weakly(self._calls.run), place="pipe.call")
            attach(pipe, "acceleration", self)
            self._applied.apply(pipe, self._ledger)

    def __repr__(self) -> str:
        state = "active" if self._applied.active else "removed"
        return f"<Acceleration of {self.plan.model.pipeline}, quality={self.plan.quality!r}, {state}>"

    def of_copy(self, view: Any) -> Acceleration:
        """The handle of a shallow copy of the pipeline: the same, but that what it runs is the copy."""
        handle = copy.copy(self)
        handle._pipe, handle._of = weakref.ref(view), self
        return handle

    @property
    def plan(self) -> Plan:
        """What was decided and why; print it."""
        return self._applied.plan

    @property
    def progress(self) -> Callable[[Progress], None] | None:
        """Called with a `Progress` at the start of each stage and after each denoising step; None to leave it.

        May be set. What it raises ends the call.
        """
        return self._calls.progress

    @progress.setter
    def progress(self, progress: Callable[[Progress], None] | None) -> None:
        self._calls.progress = progress

    def accelerates(self, pipe: Any) -> bool:
        """Whether this is the acceleration of `pipe` itself, not of a pipeline that `pipe` is a shallow copy of."""
        return self._applied.pipe is pipe

    def report(self) -> Report:
        """Where the time of the latest call went that has returned, or request whose result was taken.

        Raises:
            PipeboostError: no call has finished yet.
        """
        if self._calls.finished is None:
            raise PipeboostError("there is nothing to report yet: call the pipeline first")
        return self._calls.report_of(self._calls.finished)

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

    def submit(self, **call: Any) -> Request:
        """Let `pipe(**call)` run in another thread, after what was submitted before it.

        Requests that overlap in `run_many` do so here; the others run one after the other. A plain call waits for those
        submitted before it. On several ranks each submits the same requests in the same order.

        Returns:
            The request: its result, progress and report, and the way to cancel it.

        Raises:
            PipeboostError: the acceleration was removed.
        """
        return self._requests.submit(self._alive_pipe(), call)

    def run_many(self, requests: Sequence[Mapping[str, Any]], *, overlap: bool = True) -> Iterator[Any]:
        """Run `pipe(**request)` for each request and yield what they return, in order.

        While two denoise, the text of the next is encoded and the previous is decoded. The results are those of one
        call after the other, to the bit. They do run one after the other where that would not hold (a request without a
        `generator` of its own), where components are offloaded, and on several ranks. After each output `report()` is
        of its request.

        Args:
            requests: arguments of each call.
            overlap: False runs them one after the other.

        Raises:
            PipeboostError: the acceleration was removed. What a request raises comes up in its turn; the requests after
                it are not run.
        """
        yield from self._requests.run_many(self._alive_pipe(), requests, overlap=overlap)

    def warm_up(self, **call: Any) -> None:
        """Run `pipe(**call)` without reporting it, so that what comes after is compiled and loaded."""
        with recorded_by(CallRecord(kept=True)):
            self._alive_pipe()(**call)

    def profiled(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a report knows the peak memory of each stage. Restarts torch's peak counter at every stage."""
        return self._calls.profiled()

    def verify(self, *, per_block: bool = False, **call: Any) -> Verification:
        """Run `pipe(**call)` stock and accelerated, and check the promise of the tier.

        Stock runs again, and compiled where the tier compiles, to show how far it is from itself. Without a `generator`
        in `call`, all runs get one with seed 0; a given one is rewound for each run and left as it was.

        Args:
            per_block: also compare each block of the transformers on the inputs that stock gave it.

        Raises:
            PipeboostError: the acceleration was removed.
        """
        return verify_acceleration(self, self._alive_pipe(), call, per_block=per_block)

    def tune(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        *,
        budget: str = "psnr>=30",
        share: float = 0.95,
        held_out: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: Callable[[int], None] | None = None,
        **call: Any,
    ) -> Tuned:
        """Find which denoising steps to compute and between which to extrapolate, within a budget of quality.

        Args:
            prompts: texts, or arguments of one call each; the more, the surer the answer.
            budget: what each result has to keep, beside stock's with the same seed: `psnr>=` dB, `ssim>=` or `lpips<=`.
            share: of the prompts that has to.
            held_out: how many of the last prompts judge the result, unseen by the search; None is a third.
            folder: keeps what was measured, so that the same call continues where it was stopped.
            progress: called with the number of calls made so far.
            call: arguments that all calls have, such as `num_inference_steps`.

        Raises:
            PipeboostError: the budget cannot be read, there are too few prompts, or the pipeline cannot be searched.
        """
        return tune(
            self._alive_pipe(),
            self._applied,
            [{**call, **({"prompt": each} if isinstance(each, str) else each)} for each in prompts],
            budget=budget,
            share=share,
            held_out=held_out,
            stock=self.paused,
            folder=folder,
            progress=progress,
        )

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Inside this context the pipeline runs stock in this thread; calls of other threads stay accelerated."""
        return self._calls.paused()

    @contextlib.contextmanager
    def open(self) -> Iterator[Call]:
        """Run the pipeline's transformers directly, accelerated, without its script: inside, a call is open."""
        pipe, record = self._alive_pipe(), CallRecord()
        with self._calls.admitted(record, pipe):
            device = self._applied.follow_device(pipe)
            self._applied.bind_on_all_ranks(pipe, "open()")
            with self._calls.opened(pipe, {}, device, record) as call, without_cfg_parallel(call):
                yield call

    def cancel(self, call: Call | None = None) -> None:
        """Make all calls and requests that run or wait, or one call, raise `Cancelled` at their next denoising step."""
        self._calls.cancel(call)

    def remove(self) -> None:
        """Make the pipeline stock again, to the bit; what the user changed meanwhile stays. Harmless when repeated.

        Raises:
            PipeboostError: a call is running, or a request waits.
        """
        with self._lock:
            self._requests.refuse_while_under_way()
            self._applied.begin_removal()
            self._ledger.undo()

    def _refuse_to_give_way(self, pipe: Any) -> None:
        """Raise where `pipe` cannot get another acceleration in the place of this one.

        Raises:
            PipeboostError: it is a shallow copy, or a call is running.
        """
        if not self.accelerates(pipe):
            raise UnsupportedError(
                "this pipeline is a shallow copy of an accelerated one and shares its acceleration; accelerate the "
                "original, or a copy.deepcopy"
            )
        self._requests.refuse_while_under_way()
        self._applied.refuse_while_running()

    def _alive_pipe(self) -> Any:
        if self._applied.removed:
            raise PipeboostError("this acceleration was removed; call accelerate_pipeline again")
        pipe = self._pipe()
        if pipe is None:
            raise PipeboostError("the pipeline that was accelerated is gone; only shallow copies of it are left")
        return pipe

    def _detach(self) -> None:
        pipe = self._applied.pipe
        if pipe is not None and vars(pipe).get("acceleration") is self:
            del pipe.acceleration
