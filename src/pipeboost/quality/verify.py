"""`verify_acceleration`: whether an acceleration keeps the promise of its tier."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeboost.core.ledger import Ledger
from pipeboost.quality.metrics import outputs_on_host, psnr, relative_error
from pipeboost.quality.tuned_stock import stock_compile

FLOOR_MARGIN = 1.2
"""`lossless`: one forward's error may be this many times the error of stock's own compile."""
BALANCED_PSNR = 30.0
"""`balanced`: PSNR to stock of the finished result, dB."""
FAST_PSNR = 25.0
"""`fast`: the stated budget, PSNR to stock of the finished result, dB."""


@dataclass(frozen=True)
class Verification:
    """What `Acceleration.verify` found.

    Attributes:
        quality: the tier whose promise was checked.
        passed: whether it was kept.
        promise: the promise in words.
        psnr: of the whole call's result to stock, dB; the worst where it has several outputs.
        max_difference: of the whole call's result to stock; the largest where it has several outputs.
        forward_errors: transformer → relative error of one forward to stock on the same inputs; where it has several
            outputs `transformer.output` → that of each.
        noise_floor: the same → relative error that stock's own compile makes there; empty where it was not needed.
        outputs: output of the whole call → its PSNR to stock, dB, and its largest difference.
        rival: where steps are skipped, as many steps of stock as are computed, and their PSNR to stock with all, dB.
    """

    quality: str
    passed: bool
    promise: str
    psnr: float
    max_difference: float
    forward_errors: dict[str, float] = field(default_factory=dict)
    noise_floor: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, tuple[float, float]] = field(default_factory=dict)
    rival: tuple[int, float] | None = None

    def __str__(self) -> str:
        lines = [f"{'passed' if self.passed else 'FAILED'}: {self.promise}"]
        for name, (ratio, difference) in self.outputs.items():
            of = f", {name}" if len(self.outputs) > 1 else ""
            lines.append(f"  whole call{of}: PSNR to stock {ratio:.1f} dB, largest difference {difference:.3g}")
        if self.rival is not None:
            lines.append(f"  stock with as many forwards, {self.rival[0]} steps: PSNR {self.rival[1]:.1f} dB")
        for name, error in self.forward_errors.items():
            floor = f", noise floor {self.noise_floor[name]:.3g}" if name in self.noise_floor else ""
            lines.append(f"  one forward of {name}: relative error {error:.3g}{floor}")
        return "\n".join(lines)


def verify_acceleration(acceleration: Any, pipe: Any, call: Mapping[str, Any]) -> Verification:
    """Compare `pipe(**call)` stock and accelerated, and one forward of each denoiser on the inputs stock gave it.

    Args:
        acceleration: that of `pipe`; its tier is checked.
    """
    quality, denoisers = acceleration.plan.quality, acceleration.plan.family.models(pipe)
    first: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.Tensor]]] = {}
    with _rewound(call) as arguments, acceleration.paused(), _first_forwards(denoisers, first):
        stock = outputs_on_host(pipe(**arguments))
    with _rewound(call) as arguments:
        ours = outputs_on_host(pipe(**arguments))
    rival, forwards = None, acceleration.report().computed_steps
    if forwards is not None and not call.keys() & {"sigmas", "timesteps"}:
        with _rewound(call) as arguments, acceleration.paused():
            fewer = outputs_on_host(pipe(**{**arguments, "num_inference_steps": forwards}))
        rival = forwards, min(psnr(fewer[name].numpy(), stock[name].numpy()) for name in stock)
    whole = {}
    for name, expected in stock.items():
        difference = float((ours[name].double() - expected.double()).abs().max())
        whole[name] = psnr(ours[name].numpy(), expected.numpy()), difference
    ratio, difference = min(each for each, _ in whole.values()), max(each for _, each in whole.values())
    errors: dict[str, float] = {}
    floors: dict[str, float] = {}
    for path, (args, kwargs, outputs) in first.items() if quality != "exact" else ():
        with torch.no_grad(), acceleration.open():
            found = _errors(path, denoisers[path](*args, **kwargs), outputs)
        errors |= found
        if quality == "lossless" and any(found.values()):
            with torch.no_grad(), acceleration.paused(), stock_compile(denoisers[path], fullgraph=True):
                floors |= _errors(path, denoisers[path](*args, **kwargs), outputs)
    promise, passed = _judge(quality, difference, ratio, errors, floors)
    return Verification(quality, passed, promise, ratio, difference, errors, floors, whole, rival)


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
