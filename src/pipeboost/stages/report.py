"""Where the time and memory of one call went: per stage and denoising step, as a table, JSON, a trace or a picture."""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeboost.contract.call import Call
from pipeboost.core.errors import MissingPackageError
from pipeboost.features.cache.state import CACHE
from pipeboost.features.offload.component import LOADS
from pipeboost.features.offload.copy_stream import MOVES
from pipeboost.features.parallel.vae import VAE_FORWARDS
from pipeboost.features.reuse.attach import PROMPTS
from pipeboost.stages.spans import WHOLE_CALL, Span


@dataclass(frozen=True)
class TraceEvent:
    """One span on the call's own clock: seconds from the start of the call; bytes on the device around it."""

    stage: str
    what: str
    step: int | None
    branch: int | None
    start: float
    seconds: float
    memory_before: int | None = None
    memory_after: int | None = None


@dataclass(frozen=True)
class StageMemory:
    """Bytes allocated on the device around a stage.

    Attributes:
        before: at the stage's first start.
        after: at its last end.
        peak: the most in between, where it is known: in a profiled call, or where it was the highest so far.
    """

    before: int
    after: int
    peak: int | None


@dataclass(frozen=True)
class Load:
    """A component's weights as they were put on the device."""

    component: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What one call did.

    Attributes:
        pipeline: class name of the pipeline.
        seconds: wall time of the call.
        stages: stage → seconds, without what ran nested inside it; `"other"` is the rest of the call.
        steps: seconds of each denoising step, from its first forward to the end of the scheduler's step.
        memory: peak bytes allocated on the device, in the call where it was profiled, else since the process began or
            the user reset it; None on a CPU.
        stage_memory: stage → the memory around it; empty on a CPU.
        moved: stage → bytes of weights that went from host to device in it, without what ran nested inside it.
        components: component → bytes of its weights.
        loads: what was put on the device during the call.
        cache: per guidance branch and expert, `"transformer branch 0"` → steps computed and steps skipped.
        skipped: the same → of each of its steps, whether it was skipped.
        reuse: prompts whose embeddings were found, and those that were encoded.
        vae: on several ranks, forwards of its encoder and decoder that they shared, and those that each ran whole, with
            the reason.
        ulysses: how ranks that share tokens exchange heads for them; empty where none do.
        compiled: transformer → graphs compiled, seconds spent on it, and forwards of its blocks that ran eager with the
            reason, in this process so far.
        quantised: transformer → linears in 8 bits, and how often they changed places with the weights as they were.
        graphs: transformer → CUDA graphs captured and dropped, their bytes, forwards replayed, and why the others were
            not, so far.
        trace: every span.
    """

    pipeline: str
    seconds: float
    stages: dict[str, float]
    steps: list[float]
    memory: int | None
    stage_memory: dict[str, StageMemory] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    cache: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, list[bool]] = field(default_factory=dict)
    reuse: dict[str, int] = field(default_factory=dict)
    vae: dict[str, int] = field(default_factory=dict)
    ulysses: str = ""
    compiled: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantised: dict[str, dict[str, Any]] = field(default_factory=dict)
    graphs: dict[str, dict[str, Any]] = field(default_factory=dict)
    trace: list[TraceEvent] = field(default_factory=list)

    @classmethod
    def of(cls, spans: Sequence[Span], moves: Sequence[tuple[float, int]], **counts: Any) -> Report:
        """Read what is kept of a call; on CUDA this waits for its end.

        Args:
            spans: in order of their start, the first being the whole call.
            moves: when weights were sent to the device, by `time.perf_counter`, and their bytes.
            counts: the fields that others have counted, and those of the pipeline.
        """
        whole = spans[0]
        if whole.events is not None:
            whole.events[1].synchronize()
        sent, total = [at for at, _ in moves], [0, *accumulate(nbytes for _, nbytes in moves)]
        moved = [total[bisect(sent, span.end)] - total[bisect(sent, span.start)] for span in spans]
        memory = whole.memory_peak
        if memory is None and whole.memory_after is not None:
            memory = torch.cuda.max_memory_allocated(whole.events[1].device if whole.events is not None else None)
        return cls(
            seconds=whole.seconds(),
            stages=_by_stage(spans, [span.seconds() for span in spans]),
            steps=[span.seconds() for span in spans if span.what == "step"],
            memory=memory,
            stage_memory=_stage_memory(spans),
            moved={stage: round(nbytes) for stage, nbytes in _by_stage(spans, moved).items() if nbytes},
            trace=[
                TraceEvent(
                    span.stage, span.what, span.step, span.branch, _start(span, whole), span.seconds(),
                    span.memory_before, span.memory_after,
                )
                for span in spans
            ],
            **counts,
        )  # fmt: skip

    def to_json(self, path: str | Path | None = None) -> str:
        """All fields as JSON; also written to `path` if one is given."""
        text = json.dumps(asdict(self), indent=2, default=str)
        if path is not None:
            Path(path).write_text(text)
        return text

    def to_chrome_trace(self, path: str | Path) -> None:
        """Write a trace that chrome://tracing and Perfetto open: spans in one row, device memory as a counter."""
        Path(path).write_text(json.dumps({"traceEvents": self.trace_events(), "displayTimeUnit": "ms"}))

    def trace_events(self, *, process: int = 0, start: float = 0.0) -> list[dict[str, Any]]:
        """The events of a Chrome trace, as those of one `process`, `start` seconds after the trace's own."""
        events: list[dict[str, Any]] = []
        for event in self.trace:
            begin, end = ((start + at) * 1e6 for at in (event.start, event.start + event.seconds))
            name = event.stage if event.what == "stage" else f"{event.what} {event.step}"
            args = {"step": event.step, "branch": event.branch}
            row = {"name": name, "cat": event.stage, "ph": "X", "ts": begin, "dur": event.seconds * 1e6}
            events.append({**row, "pid": process, "tid": 0, "args": args})
            for at, memory in ((begin, event.memory_before), (end, event.memory_after)):
                if memory is not None:
                    counter = {"name": "memory", "ph": "C", "ts": at, "pid": process}
                    events.append({**counter, "args": {"GiB": memory / 2**30}})
        return events

    def plot(self, path: str | Path) -> None:
        """Write a picture: stages as bars, steps as a line, skipped ones marked. Needs matplotlib, the extra `plot`."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingPackageError("Report.plot needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = sorted(self.stages, key=self.stages.__getitem__)
        left.barh(names, [self.stages[name] for name in names])
        left.set(xlabel="seconds", title=f"{self.pipeline}: {self.seconds:.2f} s")
        milliseconds = dict(enumerate((seconds * 1e3 for seconds in self.steps), 1))
        right.plot(milliseconds.keys(), milliseconds.values(), color="0.7")
        for skipped, label in ((False, "computed"), (True, "skipped")):
            at = [step for step, each in enumerate(self.skipped_steps, 1) if each is skipped]
            style = {"ls": "", "marker": "o", "color": "C0", "mfc": "white" if skipped else "C0"}
            right.plot(at, [milliseconds[step] for step in at], label=label, **style)
        if any(self.skipped_steps):
            right.legend()
        right.set(xlabel="denoising step", ylabel="milliseconds", ylim=(0, None))
        figure.savefig(path, dpi=120)

    @property
    def skipped_steps(self) -> list[bool]:
        """Of each denoising step, whether its first forward was skipped."""
        experts = [skipped for name, skipped in self.skipped.items() if name.endswith(" branch 0")]
        found = [each for skipped in experts for each in skipped]
        # A scheduler may ask for several forwards a step, and a call may end early.
        return found if len(found) == len(self.steps) else [False] * len(self.steps)

    @property
    def flops_saved(self) -> float | None:
        """Share of the transformer's FLOPs that skipped steps saved on this rank; None where blocks are skipped."""
        whole = [skipped for name, skipped in self.skipped.items() if ".output branch " in name]
        if not whole or len(whole) < len(self.skipped):
            return None
        return sum(map(sum, whole)) / max(sum(map(len, whole)), 1)

    @property
    def seconds_saved(self) -> float | None:
        """Time that skipped steps took less than as many computed ones, by their medians; None where either is missing.

        The first computed step is left out, for it may have compiled or loaded something.
        """
        skipped = [seconds for seconds, each in zip(self.steps, self.skipped_steps, strict=True) if each]
        computed = [seconds for seconds, each in zip(self.steps, self.skipped_steps, strict=True) if not each][1:]
        return (median(computed) - median(skipped)) * len(skipped) if skipped and computed else None

    @property
    def computed_steps(self) -> int | None:
        """How many denoising steps were computed, the mean of guidance branches; None where none could be skipped."""
        rows: dict[str, list[int]] = {}
        for name, counts in self.cache.items():
            rows.setdefault(name.partition(" branch ")[0], []).append(counts["computed"])
        of_denoisers: dict[str, int] = {}
        for row, computed in rows.items():
            denoiser = row.partition(".")[0]
            of_denoisers[denoiser] = max(of_denoisers.get(denoiser, 0), math.ceil(sum(computed) / len(computed)))
        return sum(of_denoisers.values()) if rows else None

    def __str__(self) -> str:
        width = max(len(name) for name in self.stages)
        lines = [f"{self.pipeline}: {self.seconds:.3f} s"]
        for name, seconds in sorted(self.stages.items(), key=lambda item: -item[1]):
            line = f"  {name:<{width}}  {seconds:8.3f} s  {seconds / max(self.seconds, 1e-9):6.1%}"
            if (memory := self.stage_memory.get(name)) is not None:
                line += f"  {memory.before / 2**30:6.2f} to {memory.after / 2**30:.2f} GiB"
                line += "" if memory.peak is None else f", at most {memory.peak / 2**30:.2f}"
            lines.append(line + (f", {self.moved[name] / 2**30:.2f} moved" if name in self.moved else ""))
        if self.steps:
            fastest, slowest = min(self.steps), max(self.steps)
            lines.append(
                f"  {len(self.steps)} steps, {fastest * 1e3:.1f} to {slowest * 1e3:.1f} ms each, "
                f"median {sorted(self.steps)[len(self.steps) // 2] * 1e3:.1f} ms"
            )
        if self.memory is not None:
            lines.append(f"  peak memory {self.memory / 2**30:.2f} GiB")
        if self.loads:
            moved = sum(load.bytes for load in self.loads)
            lines.append(f"  {len(self.loads)} loads moved {moved / 2**30:.2f} GiB to the device")
        for name, count in self.cache.items():
            lines.append(f"  cache: {name}: {count['computed']} steps computed, {count['skipped']} skipped")
        saved = [] if self.flops_saved is None else [f"{self.flops_saved:.0%} of the transformer's FLOPs"]
        saved += [] if self.seconds_saved is None else [f"{self.seconds_saved:.3f} s"]
        if saved:
            lines.append(f"  cache: skipping saved {' and '.join(saved)}")
        if self.reuse:
            lines.append(f"  prompts: {self.reuse.get('hits', 0)} reused, {self.reuse.get('misses', 0)} encoded")
        if self.vae:
            lines.append(f"  VAE: {', '.join(f'{what} {count} times' for what, count in self.vae.items())}")
        if self.ulysses:
            lines.append(f"  Ulysses: heads and tokens are exchanged by {self.ulysses}")
        for name, cost in self.compiled.items():
            lines.append(f"  compile: {name}: {cost['graphs']:.0f} graphs in {cost['seconds']:.1f} s so far")
            lines.extend(f"    {count} times eager: {reason}" for reason, count in cost["eager"].items())
        for name, found in self.quantised.items():
            lines.append(
                f"  8 bits: {name}: {found['linears']} linears, {found['nbytes'] / 2**30:.2f} GiB, "
                f"{found['host_bytes'] / 2**30:.2f} GiB kept on the host; quantised {found['quantised']} times, "
                f"put back {found['restored']} times, in {found['seconds']:.1f} s so far"
            )
        for name, found in self.graphs.items():
            changed = f", dropped {found['dropped']} times ({found['change']})" if found["dropped"] else ""
            lines.append(
                f"  CUDA graphs: {name}: {found['captured']} captured, {found['nbytes'] / 2**30:.2f} GiB, "
                f"{found['replayed']} forwards replayed so far{changed}"
            )
            lines.extend(f"    {count} not replayed: {reason}" for reason, count in found["eager"].items())
        return "\n".join(lines)


def report_maker(call: Call) -> Callable[..., Report]:
    """Return `Report.of` of a call that has ended, which lacks what is of its pipeline and keeps neither alive."""
    cache, reuse, vae, moves = call.get(CACHE), call.get(PROMPTS), call.get(VAE_FORWARDS), call.get(MOVES)
    rows = {f"{c.denoiser}.{c.blocks} branch {c.branch}": c for c in (() if cache is None else cache.counts())}
    counts = {
        "loads": [Load(*load) for load in call.get(LOADS) or ()],
        "cache": {name: {"computed": c.computed_steps, "skipped": c.cached_steps} for name, c in rows.items()},
        "skipped": {name: list(c.skipped) for name, c in rows.items()},
        "reuse": dict(reuse or {}),
        "vae": dict(vae or {}),
    }
    return partial(Report.of, call.events, moves or [], **counts)


def _start(span: Span, whole: Span) -> float:
    """Seconds from the start of the call, on the device's clock where there is one: the host runs ahead of it."""
    if span.events is not None and whole.events is not None:
        return float(whole.events[0].elapsed_time(span.events[0])) / 1e3
    return span.start - whole.start


def _stage_memory(spans: Sequence[Span]) -> dict[str, StageMemory]:
    found: dict[str, list[Span]] = {}
    for span in spans:
        if span.memory_after is not None and span.stage != WHOLE_CALL:
            found.setdefault(span.stage, []).append(span)
    result = {}
    for stage, each in found.items():
        before, after = each[0].memory_before, each[-1].memory_after
        assert before is not None
        assert after is not None
        peaks = [span.memory_peak for span in each if span.memory_peak is not None]
        result[stage] = StageMemory(before, after, max(peaks, default=None))
    return result


def _by_stage(spans: Sequence[Span], values: Sequence[float]) -> dict[str, float]:
    """Stage → the sum of its spans' values, each less those of the spans directly inside it.

    Args:
        spans: in order of their start.
        values: a time or a count of each span, what ran inside it included.
    """
    own = list(values)
    open_spans: list[int] = []
    for index, span in enumerate(spans):
        del open_spans[span.depth :]
        if open_spans:
            own[open_spans[-1]] -= values[index]
        open_spans.append(index)
    sums: dict[str, float] = {}
    for span, value in zip(spans, own, strict=True):
        sums[span.stage] = sums.get(span.stage, 0.0) + value
    return sums


def component_bytes(components: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of parameters and buffers, by component."""
    return {
        name: sum(t.numel() * t.element_size() for t in (*component.parameters(), *component.buffers()))
        for name, component in components.items()
        if isinstance(component, torch.nn.Module)
    }
