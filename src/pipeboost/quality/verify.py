"""`verify_acceleration`: whether an acceleration keeps the promise of its tier."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from pipeboost.core.errors import UnsupportedError, one_line
from pipeboost.core.ledger import Ledger
from pipeboost.quality.block_errors import block_errors
from pipeboost.quality.call_metrics import METRICS, Made, Measure, metrics_for
from pipeboost.quality.contact_sheet import contact_sheet
from pipeboost.quality.metrics import outputs_on_host, psnr, relative_error
from pipeboost.quality.tuned_stock import stock_compile
from pipeboost.quality.verification import Verification

FLOOR_MARGIN = 1.2
"""`lossless`: one forward's error may be this many times the error of stock's own compile."""
BALANCED_PSNR = 30.0
"""`balanced`: PSNR to stock of the finished result, dB."""
FAST_PSNR = 25.0
"""`fast`: the stated budget, PSNR to stock of the finished result, dB."""


def verify_acceleration(
    acceleration: Any, pipe: Any, call: Mapping[str, Any], *, per_block: bool = False
) -> Verification:
    """Compare `pipe(**call)` stock and accelerated, and one forward of each denoiser on the inputs stock gave it.

    Stock against itself, run again and compiled where the acceleration compiles, is the floor of the whole call.

    Args:
        acceleration: that of `pipe`; its tier is checked.
        per_block: also compare each block of the denoisers on the inputs stock gave it.
    """
    plan, denoisers = acceleration.plan, acceleration.plan.family.models(pipe)
    quality, first = plan.quality, {}  # type: ignore[var-annotated]

    def make(**changed: Any) -> Made:
        with _rewound(call) as arguments:
            return Made.of(pipe(**arguments | changed), call)

    with acceleration.paused(), _first_forwards(denoisers, first):
        stock = make()
    ours = make()
    forwards = acceleration.report().computed_steps
    measures, left_out = metrics_for(stock)
    metrics = _Metrics(measures, stock)
    metrics.add("ours", ours)
    with acceleration.paused():
        if forwards is not None and not call.keys() & {"sigmas", "timesteps"}:
            metrics.add("stock, fewer steps", make(num_inference_steps=forwards))
        # The latest call leaves the pipeline with its number of steps, by which forwards outside of a call go.
        metrics.add("stock again", make())
    errors, floors, blocks = {}, {}, {}  # type: ignore[var-annotated]
    for path, (args, kwargs, outputs) in first.items() if quality != "exact" else ():
        with torch.no_grad(), acceleration.open():
            errors |= _errors(path, denoisers[path](*args, **kwargs), outputs)
    needed = quality == "lossless" and any(errors.values())
    if needed or plan["compile"].on:
        try:
            with torch.no_grad(), acceleration.paused(), _compiled_by_stock(denoisers):
                for path, (args, kwargs, outputs) in first.items() if needed else ():
                    floors |= _errors(path, denoisers[path](*args, **kwargs), outputs)
                if plan["compile"].on:
                    metrics.add("stock compiled", make())
        except (UnsupportedError, TorchDynamoException) as error:
            if needed:
                raise
            left_out["stock compiled"] = f"stock compiled: {one_line(error)}"
    for path, (args, kwargs, _) in first.items() if per_block else ():
        found, why = _blocks(acceleration, denoisers[path], args, kwargs)
        blocks |= {f"{path}.{name}": error for name, error in found.items()}
        left_out |= {} if why is None else {f"blocks of {path}": why}
    whole = {}
    for name, expected in stock.outputs.items():
        difference = float((ours.outputs[name].double() - expected.double()).abs().max())
        whole[name] = psnr(ours.outputs[name].numpy(), expected.numpy()), difference
    ratio, difference = min(each for each, _ in whole.values()), max(each for _, each in whole.values())
    promise, passed = _judge(quality, difference, ratio, errors, floors)
    rival = metrics.values.get("psnr", {}).get("stock, fewer steps")
    title = f"{plan.model.pipeline}, {quality}: {ratio:.1f} dB to stock, {'passed' if passed else 'FAILED'}"
    return Verification(
        quality, passed, promise, ratio, difference, errors, floors, whole,
        rival=None if rival is None or forwards is None else (forwards, rival),
        metrics=metrics.values,
        left_out=left_out,
        block_errors=blocks,
        contact_sheet=contact_sheet(title, stock.pictures, ours.pictures) if stock.pictures else None,
    )  # fmt: skip


class _Metrics:
    """The metrics of whole calls: `values` is metric → whose result → its value."""

    def __init__(self, measures: Mapping[str, Measure], stock: Made) -> None:
        self._measures, self._stock = measures, stock
        self.values: dict[str, dict[str, float]] = {name: {} for name in measures}
        for name, measure in measures.items():
            if METRICS[name].alone:
                self.values[name]["stock"] = measure(stock, stock)

    def add(self, whose: str, made: Made) -> None:
        """Judge what a call made; nothing of it is kept."""
        for name, measure in self._measures.items():
            self.values[name][whose] = measure(made, self._stock)


def _blocks(acceleration: Any, model: Any, args: Any, kwargs: Any) -> tuple[dict[str, float], str | None]:
    if getattr(acceleration.plan["compile"].settings, "scope", None) == "full":
        return {}, "blocks: the transformer is compiled as a whole; use compile='regional' to look into it"

    def run(where: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        with torch.no_grad(), where():
            model(*args, **kwargs)

    return block_errors(model, lambda: run(acceleration.paused), lambda: run(acceleration.open))


@contextlib.contextmanager
def _compiled_by_stock(denoisers: Mapping[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for model in denoisers.values():
            stack.enter_context(stock_compile(model, fullgraph=True))
        yield


def _judge(
    quality: str, difference: float, ratio: float, errors: Mapping[str, float], floors: Mapping[str, float]
) -> tuple[str, bool]:
    if quality == "exact":
        return "bit-identical to stock", difference == 0
    if quality == "lossless":
        kept = all(error <= FLOOR_MARGIN * floors.get(name, 0.0) for name, error in errors.items())
        return f"one forward within {FLOOR_MARGIN} times the noise floor of stock's own compile", kept
    budget = BALANCED_PSNR if quality == "balanced" else FAST_PSNR
    return f"PSNR to stock of at least {budget:.0f} dB", ratio >= budget


@contextlib.contextmanager
def _rewound(call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    given = call.get("generator") or torch.Generator("cpu").manual_seed(0)
    generators = given if isinstance(given, list) else [given]
    states = [generator.get_state() for generator in generators]
    try:
        yield {**call, "generator": given}
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextlib.contextmanager
def _first_forwards(denoisers: Mapping[str, Any], into: dict[str, Any]) -> Iterator[None]:
    """Keep the arguments and output of each denoiser's first forward."""

    def keep(name: str, call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        if name in into:
            return call_next(*args, **kwargs)
        inputs = copy.deepcopy((args, kwargs))
        output = call_next(*args, **kwargs)
        into[name] = (*inputs, outputs_on_host(output))
        return output

    ledger = Ledger()
    try:
        for name, model in denoisers.items():
            ledger.add_middleware(model, "__call__", functools.partial(keep, name), place="component.verify")
        yield
    finally:
        ledger.undo()


def _errors(path: str, result: Any, stock: Mapping[str, torch.Tensor]) -> dict[str, float]:
    ours = outputs_on_host(result)
    whole = len(stock) == 1
    return {path if whole else f"{path}.{name}": relative_error(ours[name], each) for name, each in stock.items()}
