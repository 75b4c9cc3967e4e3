"""Where the time of one call went: per stage and per denoising step, as a table, JSON, a trace or a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from pipeboost.stages.watch import Span


@dataclass(frozen=True)
class TraceEvent:
    """One span on the call's own clock: seconds from the start of the call."""

    stage: str
    step: int | None
    branch: int | None
    start: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """What one call did.

    Attributes:
        pipeline: class name of the pipeline.
        seconds: wall time of the call.
        stages: stage → seconds, without what ran nested inside it; `"other"` is the rest of the call.
        steps: seconds of each denoising step's forwards and scheduler step.
        memory: peak bytes allocated on the device since the process began or the user reset it; None on CPU.
        cache: per guidance branch and expert, `"transformer branch 0"` → steps computed and steps skipped.
        compiled: transformer → graphs compiled and seconds spent on it in this process so far.
        trace: every span.
    """

    pipeline: str
    seconds: float
    stages: dict[str, float]
    steps: list[float]
    memory: int | None
    cache: dict[str, dict[str, int]] = field(default_factory=dict)
    compiled: dict[str, dict[str, float]] = field(default_factory=dict)
    trace: list[TraceEvent] = field(default_factory=list)

    @classmethod
    def of_spans(
        cls,
        spans: list[Span],
        *,
        pipeline: str,
        cache: dict[str, dict[str, int]],
        compiled: dict[str, dict[str, float]],
    ) -> Report:
        """Read a finished call's spans, the first of which is the whole of it; on CUDA this waits for its work."""
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if on_cuda:
            torch.cuda.synchronize()
        own = _without_nested(spans)
        stages: dict[str, float] = {}
        steps: dict[int, float] = {}
        for span, own_seconds in zip(spans, own, strict=True):
            stages[span.stage] = stages.get(span.stage, 0.0) + own_seconds
            if span.step is not None:
                steps[span.step] = steps.get(span.step, 0.0) + own_seconds
        return cls(
            pipeline=pipeline,
            seconds=spans[0].seconds(),
            stages=stages,
            steps=[steps[step] for step in sorted(steps)],
            memory=torch.cuda.max_memory_allocated() if on_cuda else None,
            cache=cache,
            compiled=compiled,
            trace=[
                TraceEvent(span.stage, span.step, span.branch, span.start - spans[0].start, span.seconds())
                for span in spans
            ],
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """All fields as JSON; also written to `path` if one is given."""
        text = json.dumps(asdict(self), indent=2, default=str)
        if path is not None:
            Path(path).write_text(text)
        return text

    def to_chrome_trace(self, path: str | Path) -> None:
        """Write a trace that chrome://tracing and Perfetto open; one row, microseconds."""
        events = [
            {
                "name": event.stage if event.step is None else f"{event.stage} {event.step}",
                "ph": "X",
                "ts": event.start * 1e6,
                "dur": event.seconds * 1e6,
                "pid": 0,
                "tid": 0,
                "args": {"step": event.step, "branch": event.branch},
            }
            for event in self.trace
        ]
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def plot(self, path: str | Path) -> None:
        """Write a picture: stages as one bar, steps as a line. Needs matplotlib, the extra `plot`."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            from pipeboost.errors import MissingPackageError

            raise MissingPackageError("Report.plot needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = sorted(self.stages, key=self.stages.__getitem__)
        left.barh(names, [self.stages[name] for name in names])
        left.set_xlabel("seconds")
        left.set_title(f"{self.pipeline}: {self.seconds:.2f} s")
        right.plot(range(1, len(self.steps) + 1), [seconds * 1e3 for seconds in self.steps], marker="o")
        right.set_xlabel("denoising step")
        right.set_ylabel("milliseconds")
        right.set_ylim(bottom=0)
        figure.savefig(path, dpi=120)

    def __str__(self) -> str:
        width = max(len(name) for name in self.stages)
        lines = [f"{self.pipeline}: {self.seconds:.3f} s"]
        for name, seconds in sorted(self.stages.items(), key=lambda item: -item[1]):
            lines.append(f"  {name:<{width}}  {seconds:8.3f} s  {seconds / max(self.seconds, 1e-9):6.1%}")
        if self.steps:
            fastest, slowest = min(self.steps), max(self.steps)
            lines.append(
                f"  {len(self.steps)} steps, {fastest * 1e3:.1f} to {slowest * 1e3:.1f} ms each, "
                f"median {sorted(self.steps)[len(self.steps) // 2] * 1e3:.1f} ms"
            )
        if self.memory is not None:
            lines.append(f"  peak memory {self.memory / 2**30:.2f} GiB")
        for name, counts in self.cache.items():
            lines.append(f"  cache: {name}: {counts['computed']} steps computed, {counts['skipped']} skipped")
        for name, cost in self.compiled.items():
            lines.append(f"  compile: {name}: {cost['graphs']:.0f} graphs in {cost['seconds']:.1f} s so far")
        return "\n".join(lines)


def _without_nested(spans: list[Span]) -> list[float]:
    """Each span's time less that of the spans directly inside it; spans are in order of their start."""
    own = [span.seconds() for span in spans]
    open_spans: list[int] = []
    for index, span in enumerate(spans):
        del open_spans[span.depth :]
        if open_spans:
            own[open_spans[-1]] -= span.seconds()
        open_spans.append(index)
    return own
