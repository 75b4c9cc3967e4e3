"""The one line, `accelerate_pipeline`, and the handle it leaves at `pipe.acceleration`.

This is the only place where the features meet. They are applied to each transformer in this order, and undone in
reverse:

1. attention: the innermost change, a kernel inside the blocks' own processors;
2. parallel: shards what attention then sees, so it comes before anything that captures shapes;
3. quantize: replaces linears, which must happen before a graph of them exists;
4. cache: decides which blocks run, and must call blocks that compile can still stand in front of;
5. compile: captures what the blocks have become;
6. offload: moves finished modules;
7. stages: the outermost layers, which watch everything above.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pipeboost.attention import rebind_attention, swap_attention, trim_padded_text
from pipeboost.cache import CacheCount, attach_cache
from pipeboost.call import Call, no_call, open_call
from pipeboost.compile import CompiledModel, compile_model
from pipeboost.config import AccelerationConfig, resolve_config
from pipeboost.errors import PipeboostError, UnsupportedError
from pipeboost.families import family_of
from pipeboost.hardware import detect_hardware
from pipeboost.ledger import Ledger
from pipeboost.plan import Plan, facts_of, make_plan
from pipeboost.quality import Verification, verify_acceleration
from pipeboost.seams import attach, stock_class
from pipeboost.stages import WHOLE_CALL, Report, Span, timed, watch, watched_components

P = TypeVar("P")

_CALL_DOOR_ORDER = -1000.0
_paused: ContextVar[frozenset[int]] = ContextVar("pipeboost_paused", default=frozenset())


@dataclass(frozen=True)
class _Part:
    """One component of the pipeline, or of a view of it, and what was done to it.

    It holds the component weakly: what the pipeline drops must free its memory at once.
    """

    path: str
    target: weakref.ref[Any]
    ledger: Ledger
    compiled: CompiledModel | None
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
    config: Any = None,
) -> P:
    """Accelerate a stock Diffusers pipeline in place and return the same object.

    Args:
        pipe: any Diffusers pipeline with a transformer, on the device it will run on.
        quality: the tier, which bounds how far outputs may move from stock: `"exact"` (bit-identical), `"lossless"`
            (the default: rounding only), `"balanced"` (8-bit attention), `"fast"` (step caching).
        attention, parallel, cache, compile, quantize, offload: `"auto"` (the default) lets the plan choose; None or
            False turns the feature off; a short name (`"flash3"`, `"regional"`) or the feature's dataclass fixes it.
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
        }.items()
        if not isinstance(value, _Default)
    }
    settings = resolve_config(config, given)
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
    """

    def __init__(self, pipe: Any, plan: Plan, config: AccelerationConfig) -> None:
        self.plan = plan
        self.config = config
        self._pipe = weakref.ref(pipe)
        self._ledger = Ledger()
        self._parts: dict[int, _Part] = {}
        self._calls: set[Call] = set()
        self._finished: tuple[list[Span], tuple[CacheCount, ...]] | None = None
        self._lock = threading.RLock()
        self._removed = False
        with self._ledger:
            self._ledger.record("components", _weakly(self._undo_all_parts))
            self._bind(pipe)
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
        spans, counts = self._finished
        return Report.of_spans(
            spans,
            pipeline=self.plan.facts.pipeline,
            cache={
                f"{count.denoiser}.{count.blocks} branch {count.branch}": {
                    "computed": count.computed_steps,
                    "skipped": count.cached_steps,
                }
                for count in counts
            },
            compiled={
                part.path: asdict(part.compiled.counters) for part in self._parts.values() if part.compiled is not None
            },
        )

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
        self._follow_device(pipe)
        self._bind(pipe)
        with self._opened(pipe, {}) as call:
            yield call

    def cancel(self, call: Call | None = None) -> None:
        """Make all running calls, or one, raise `Cancelled` at their next denoising step."""
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
            with no_call():
                return call_next(*args, **kwargs)
        self._follow_device(pipe)
        self._bind(pipe)
        bound = _signature(stock_class(pipe)).bind(pipe, *args, **kwargs)
        bound.apply_defaults()
        with self._opened(pipe, dict(bound.arguments)) as call:
            result = timed(call, WHOLE_CALL, None, None, lambda: call_next(*args, **kwargs))
        caches = call.state.get("cache")
        self._finished = (call.events, caches.counts() if caches is not None else ())
        return result

    @contextlib.contextmanager
    def _opened(self, pipe: Any, arguments: dict[str, Any]) -> Iterator[Call]:
        features = frozenset(decision.feature for decision in self.plan.decisions if decision.on)
        with open_call(pipe, owner=self, arguments=arguments, features=features) as call:
            with self._lock:
                if self._removed:
                    raise PipeboostError("this acceleration was removed while the call was starting")
                self._calls.add(call)
            call.rebind = functools.partial(self._bind, pipe)
            try:
                yield call
            finally:
                self._calls.discard(call)

    def _follow_device(self, pipe: Any) -> None:
        """Plan anew where the pipeline was moved to another kind of device since, as `pipe.to("cuda")` does."""
        with self._lock:
            unmoved = pipe._execution_device.type == self.plan.hardware.device
            if unmoved or self._calls or pipe is not self._pipe():
                return
            plan = _plan_for(pipe, self.config)
            self._undo_all_parts()
            self.plan = plan

    def _bind(self, pipe: Any) -> None:
        """Stand in the doors of what `pipe` consists of now; cheap when nothing was replaced since the last call."""
        models = self.plan.family.models(pipe)
        components: dict[str, Any] = watched_components(pipe, models)
        with self._lock:
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
                    continue
                part = self._apply(path, obj, denoiser=path in models, of_view=pipe is not self._pipe())
                if part.ledger.changes:
                    self._parts[id(obj)] = part

    def _apply(self, path: str, obj: Any, *, denoiser: bool, of_view: bool) -> _Part:
        """Apply the plan to one component, features in the order that this module's docstring explains."""
        plan, compiled = self.plan, None
        with Ledger() as ledger:
            if denoiser and plan["attention"].on:
                swap_attention(
                    obj,
                    plan["attention"].settings,
                    ledger,
                    tier=plan.quality,
                    hardware=plan.hardware,
                    right_padded=plan.family.padded_text is not None,
                )
                trim_padded_text(obj, plan.family, ledger)
            if denoiser and plan["cache"].on:
                position = plan.family.denoisers.index(path)
                attach_cache(obj, plan["cache"].settings, plan.family, ledger, owner=self, position=position)
            if denoiser and plan["compile"].on:
                compiled = compile_model(obj, plan["compile"].settings, plan.family, ledger, owner=self)
            watch(path, obj, ledger, denoiser=denoiser)
        return _Part(path, weakref.ref(obj), ledger, compiled, of_view)

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
    # Where Diffusers offloads, the weights wait on the CPU, but the pipeline runs elsewhere.
    return make_plan(config, detect_hardware(pipe._execution_device), family, facts_of(pipe, family.models(pipe)))


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive, so that no cycle delays the freeing of a dropped pipeline."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        target = reference()
        if target is None:
            raise PipeboostError("the acceleration of this pipeline is gone; call accelerate_pipeline again")
        return target(*args, **kwargs)

    return call


@functools.cache
def _signature(pipeline_class: type) -> inspect.Signature:
    return inspect.signature(pipeline_class.__call__)
