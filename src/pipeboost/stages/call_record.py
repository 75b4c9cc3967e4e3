"""`CallRecord`: one call from before it starts until after it has ended, and what is kept of it for its report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from pipeboost.contract.call import Call
from pipeboost.features.cache import CacheCount
from pipeboost.stages.admission import Turn
from pipeboost.stages.report import Load, Report
from pipeboost.stages.spans import Progress, Span

_given: ContextVar[CallRecord | None] = ContextVar("pipeboost_call_record", default=None)


@dataclass(frozen=True)
class FinishedCall:
    """What a report needs of a call; not the call itself, which would keep its pipeline alive."""

    events: list[Span]
    caches: tuple[CacheCount, ...]
    loads: tuple[Load, ...]
    reuse: dict[str, int]
    vae: dict[str, int]

    @classmethod
    def of(cls, call: Call) -> FinishedCall:
        """Read it off a call that has ended."""
        caches = call.state.get("cache")
        return cls(
            events=call.events,
            caches=() if caches is None else caches.counts(),
            loads=tuple(Load(*load) for load in call.state.get("loads", ())),
            reuse=dict(call.state.get("reuse", {})),
            vae=dict(call.state.get("vae", {})),
        )

    def report(
        self,
        *,
        pipeline: str,
        components: dict[str, int],
        compiled: dict[str, dict[str, Any]],
        graphs: dict[str, dict[str, Any]],
        ulysses: str,
    ) -> Report:
        """The report of the call; see the fields of `Report`."""
        return Report.of_spans(
            self.events,
            pipeline=pipeline,
            components=components,
            loads=list(self.loads),
            cache={
                f"{count.denoiser}.{count.blocks} branch {count.branch}": {
                    "computed": count.computed_steps,
                    "skipped": count.cached_steps,
                }
                for count in self.caches
            },
            reuse=self.reuse,
            vae=self.vae,
            compiled=compiled,
            graphs=graphs,
            ulysses=ulysses,
        )


@dataclass(eq=False)
class CallRecord:
    """The state of one call that others than its own thread ask for.

    Attributes:
        kept: whether somebody else has it, so that it is not what the pipeline's own report tells of.
        turn: its place among the calls of its pipeline; None where it has none.
        listeners: told of each stage and denoising step; what they raise ends the call.
        progress: what they were told last.
        call: the call while it runs.
        cancelled: whether it is to be.
        finished: what a report needs of the call, once it has ended.
    """

    kept: bool = False
    turn: Turn | None = None
    listeners: list[Callable[[Progress], None]] = field(default_factory=list)
    progress: Progress | None = None
    call: Call | None = None
    cancelled: bool = False
    finished: FinishedCall | None = None

    def tell(self, progress: Progress) -> None:
        """Note where the call is, and tell the listeners."""
        self.progress = progress
        for listener in tuple(self.listeners):
            listener(progress)

    def cancel(self) -> None:
        """Make the call raise `Cancelled` where it waits for its turn, or at its next denoising step."""
        self.cancelled = True
        if self.turn is not None:
            self.turn.cancel()
        call = self.call
        if call is not None:
            call.cancel()


@contextlib.contextmanager
def recorded_by(record: CallRecord) -> Iterator[None]:
    """Inside, the next call of this thread has this record, which is kept."""
    token = _given.set(record)
    try:
        yield
    finally:
        _given.reset(token)


def take_record() -> CallRecord:
    """The record for a call that begins; calls inside it get their own."""
    record = _given.get()
    if record is None:
        return CallRecord()
    _given.set(None)
    return record
