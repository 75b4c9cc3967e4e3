"""Measure one forward of a full-size transformer: stock, ours in each tier, and tuned stock, in one run.

Ours is measured before tuned stock, and every compiled variant starts with empty compile caches, in this process and on
disk, so that none profits from what another compiled; the first one also pays for starting the compiler itself.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipeboost.bench.benchmark_result import STOCK, TUNED, BenchmarkResult, Variant
from pipeboost.bench.environment import gpu_state, versions
from pipeboost.bench.full_size import build_pipeline, call_arguments, forward_inputs, seeded
from pipeboost.bench.roofline import count_work, measure_ceilings
from pipeboost.core.errors import ConfigurationError, PipeboostError
from pipeboost.core.families import FullSize
from pipeboost.core.hardware import detect_hardware
from pipeboost.quality import tuned_stock
from pipeboost.quality.metrics import relative_error
from pipeboost.quality.timing import WARM_UPS, peak_memory, synchronize, time_runs

_MINIMUM_REPEATS = 5
_CALLS = 3


def benchmark(
    size: FullSize,
    *,
    accelerate: Callable[..., Any],
    tiers: Sequence[str],
    repeats: int,
    steps: int,
    device: str | torch.device,
    report: Callable[[str], None],
    command: str = "",
) -> BenchmarkResult:
    """Measure a published size on one device, in bf16 on a GPU and in fp32 on a CPU.

    A variant that fails is reported as failed and does not keep the others from being measured.

    Args:
        size: what to build, with random weights.
        accelerate: `accelerate_pipeline`, or what stands for it: `(pipe, quality=tier)` leaves `pipe.acceleration`.
        tiers: quality tiers of ours.
        repeats: timed forwards of each variant, at least 5.
        steps: also time a call of the pipeline with this many denoising steps; 0 for none.
        device: where to run.
        report: gets a line about each thing that is done.
        command: what was typed, for the record.

    Raises:
        ConfigurationError: too few repeats, negative steps, or Diffusers' attention default is not its own.
        PipeboostError: stock's output is constant or not finite, so that no error to it can be given.
    """
    check_counts(repeats=repeats, steps=steps)
    tuned_stock.require_native_default()
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    current = torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), seeded(place), current:
        return _Session(size, place, accelerate, repeats, steps, report).run(tiers, command)


def check_counts(*, repeats: int, steps: int) -> None:
    """Refuse counts that give no figure.

    Raises:
        ConfigurationError: fewer repeats than make a median, or negative steps.
    """
    if repeats < _MINIMUM_REPEATS:
        raise ConfigurationError(f"repeats={repeats} is too few for a median; use at least {_MINIMUM_REPEATS}")
    if steps < 0:
        raise ConfigurationError(f"steps={steps} must be 0 (no pipeline call) or more")


_Applied = tuple[str, Callable[[], AbstractContextManager[Any]]]
"""A variant in place: how it runs, in words, and the context that its forwards need."""


@dataclass
class _Session:
    size: FullSize
    device: torch.device
    accelerate: Callable[..., Any]
    repeats: int
    steps: int
    log: Callable[[str], None]
    reference: torch.Tensor | None = None
    repeatable: bool = False

    def __post_init__(self) -> None:
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._build()

    def report(self, text: str) -> None:
        self.log(f"{self.size.name}: {text}")

    def run(self, tiers: Sequence[str], command: str) -> BenchmarkResult:
        size, device = self.size, self.device
        stock = self._stock()
        gpu = gpu_state(device)
        self.report("counting operations and measuring the ceilings")
        work = count_work(self._forward)
        ceilings = measure_ceilings(work, device=device, dtype=self.dtype)
        ours = [self._tried(f"pipeboost {tier}", functools.partial(self._ours, tier)) for tier in tiers]
        tuned, floor, backends = self._tuned()
        bound_ms = ceilings.bound_ms(work)

        def rated(variant: Variant) -> Variant:
            if variant.median_ms is None or stock.median_ms is None:
                return variant
            return replace(
                variant,
                speedup=stock.median_ms / variant.median_ms,
                speedup_over_tuned=None if tuned.median_ms is None else tuned.median_ms / variant.median_ms,
                tflops=work.flops / variant.median_ms / 1e9,
                share_of_bound=bound_ms / variant.median_ms,
            )

        return BenchmarkResult(
            model=size.name,
            workload=size.workload,
            config=dict(size.config),
            parameters=sum(parameter.numel() for parameter in self.pipe.transformer.parameters()),
            dtype=str(self.dtype).removeprefix("torch."),
            hardware=str(replace(detect_hardware(device), count=1)),
            gpu=gpu,
            versions=versions(),
            date=datetime.date.today().isoformat(),
            command=command,
            repeats=self.repeats,
            warm_ups=WARM_UPS,
            steps=self.steps,
            gemm_flops=work.gemm_flops,
            attention_flops=work.attention_flops,
            attention_shape=tuple(work.main_attention or ()),
            **asdict(ceilings),
            bound_ms=bound_ms,
            noise_floor=floor.relative_error,
            noise_floor_max=floor.max_error,
            stock_backends=backends,
            variants=tuple(map(rated, (stock, tuned, *ours))),
        )

    def _build(self) -> None:
        self.report(f"building {self.size.transformer} with random weights")
        self.pipe = build_pipeline(self.size, device=self.device, dtype=self.dtype)
        self.inputs = forward_inputs(self.size, device=self.device, dtype=self.dtype)

    def _forward(self, call: Any = None) -> torch.Tensor:
        """One forward; inside an open call it is the first of a new denoising step."""
        if call is not None:
            call.step += 1
            call.branch = -1
        return self.pipe.transformer(**self.inputs)[0]

    def _stock(self) -> Variant:
        stock = self._measured(
            STOCK, lambda: contextlib.nullcontext((f"attention: {tuned_stock.NATIVE}", contextlib.nullcontext))
        )
        sample = self.reference
        assert sample is not None
        if not bool(torch.isfinite(sample).all()) or float(sample.std()) == 0:
            raise PipeboostError(
                f"{self.size.transformer} gives a constant or non-finite output with random weights, so no error to "
                "it can be measured; use another configuration"
            )
        self.repeatable = torch.equal(sample, self._sample())
        return replace(stock, relative_error=0.0, max_error=0.0)

    def _ours(self, tier: str) -> Variant:
        @contextlib.contextmanager
        def applied() -> Iterator[_Applied]:
            self.accelerate(self.pipe, quality=tier)
            handle = self.pipe.acceleration
            try:
                yield str(handle.plan), handle.open
            finally:
                handle.remove()

        with tuned_stock.cold_compile_caches():
            return self._measured(f"pipeboost {tier}", applied)

    def _tuned(self) -> tuple[Variant, Variant, dict[str, float | str]]:
        """Return tuned stock, the noise floor's variant, and the backends that were tried."""
        self.report("trying the attention backends of Diffusers")
        names, seen = tuned_stock.rank_backends(self.pipe.transformer, self._forward, self.device)
        failures = []
        for name, fullgraph in [*((name, True) for name in names), *((name, False) for name in names[:1])]:
            tuned = self._tried(TUNED, functools.partial(self._compiled_stock, name, fullgraph))
            if tuned.error is None:
                native = name == tuned_stock.NATIVE
                return tuned, tuned if native else self._tried("noise floor", self._noise_floor), seen
            failures.append(f"{name}: {tuned.error}")
        failed = Variant(TUNED, error="; ".join(failures) or "no attention backend runs")
        return failed, failed, seen

    def _noise_floor(self) -> Variant:
        """One forward of stock compiled by itself, with its default attention."""
        model = self.pipe.transformer
        assert self.reference is not None
        with tuned_stock.cold_compile_caches(), tuned_stock.stock_compile(model, fullgraph=True):
            sample = self._sample()
        largest = float((sample - self.reference).abs().max())
        return Variant("noise floor", relative_error=relative_error(sample, self.reference), max_error=largest)

    def _compiled_stock(self, backend: str, fullgraph: bool) -> Variant:
        model = self.pipe.transformer

        @contextlib.contextmanager
        def applied() -> Iterator[_Applied]:
            with tuned_stock.stock_attention(model, backend), tuned_stock.stock_compile(model, fullgraph=fullgraph):
                yield f"attention: {backend}; compile_repeated_blocks(fullgraph={fullgraph})", contextlib.nullcontext

        with tuned_stock.cold_compile_caches():
            return self._measured(TUNED, applied)

    def _tried(self, name: str, measure: Callable[[], Variant]) -> Variant:
        """Return a variant, or what kept it from being measured, and leave a stock pipeline, if need be a new one."""
        try:
            variant = measure()
        except Exception as error:
            self.report(f"{name} failed\n{traceback.format_exc()}")
            text = f"{type(error).__name__}: {error}".strip()
            variant = Variant(name, error=text.splitlines()[0][:300])
        # Whether a forward gives stock's output to the bit; None where stock itself does not repeat it.
        restored: bool | None = None
        if self.repeatable and self.reference is not None:
            try:
                restored = torch.equal(self.reference, self._sample())
            except Exception:
                self.report(f"stock does not run any more\n{traceback.format_exc()}")
                restored = False
        if variant.error is not None or restored is False:
            del self.pipe
            tuned_stock.forget_compiled()
            self._build()
        return replace(variant, restored=restored)

    def _measured(self, name: str, applied: Callable[[], AbstractContextManager[_Applied]]) -> Variant:
        """Put a variant on, time its first forward, warm it up, time it, and take it off again."""
        self.report(f"{name}: first forward")
        synchronize(self.device)
        start = time.perf_counter()
        with applied() as (what, opened):
            apply_seconds = time.perf_counter() - start
            with opened() as call:
                forward = functools.partial(self._forward, call)
                forward()
                synchronize(self.device)
                cold_start = time.perf_counter() - start
                self.report(f"{name}: {WARM_UPS} warm-ups and {self.repeats} timed forwards")
                timing, output = time_runs(forward, self.device, repeats=self.repeats)
                peak = peak_memory(self.device)
                sample = self._sample(output)
                del output
            call_seconds = self._call_seconds(name)
        if self.reference is None:
            self.reference = sample
        self.report(f"{name}: {timing.median:.1f} ms")
        error = relative_error(sample, self.reference)
        if error == float("inf"):
            raise PipeboostError(f"{name} gives an output that is not finite")
        return Variant(
            name=name,
            what=what,
            milliseconds=timing.milliseconds,
            median_ms=timing.median,
            peak_bytes=peak,
            apply_seconds=apply_seconds,
            cold_start_seconds=cold_start,
            relative_error=error,
            max_error=float((sample - self.reference).abs().max()),
            call_seconds=call_seconds,
        )

    def _call_seconds(self, name: str) -> tuple[float, ...]:
        if not self.steps:
            return ()
        self.report(f"{name}: calls of {self.steps} steps")

        def call(steps: int) -> None:
            self.pipe(**call_arguments(self.pipe, self.inputs, steps=steps))

        call(min(2, self.steps))
        timing, _ = time_runs(functools.partial(call, self.steps), self.device, repeats=_CALLS, warm_ups=0)
        return tuple(each / 1e3 for each in timing.milliseconds)

    def _sample(self, output: torch.Tensor | None = None) -> torch.Tensor:
        return (self._forward() if output is None else output).detach().double().cpu()
