"""What is kept of a call that is over, and for whom: its report, the caller of several requests, or nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pipeboost.contract.call import Call
from pipeboost.features.cache import CacheCount
from pipeboost.stages.report import Load, Report
from pipeboost.stages.spans import Span

_unreported: ContextVar[bool] = ContextVar("pipeboost_unreported", default=False)
_collected: ContextVar[list[FinishedCall] | None] = ContextVar("pipeboost_collected", default=None)


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


def latest_after(call: Call, latest: FinishedCall | None) -> FinishedCall | None:
    """Which finished call to report once `call` has ended: it, or `latest` where nobody or another asks for it."""
    collected = _collected.get()
    if _unreported.get():
        return latest
    if collected is None:
        return FinishedCall.of(call)
    collected.append(FinishedCall.of(call))
    return latest


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Calls inside leave no report."""
    token = _unreported.set(True)
    try:
        yield
    finally:
        _unreported.reset(token)


def with_what_finished(view: Any, request: Mapping[str, Any]) -> tuple[Any, FinishedCall | None]:
    """One of several overlapping requests: what it returns, and its finished call; None where it ran stock."""
    finished: list[FinishedCall] = []
    token = _collected.set(finished)
    try:
        # Calls inside this one, from a callback, finish before it.
        output = view(**request)
        return output, finished[-1] if finished else None
    finally:
        _collected.reset(token)
