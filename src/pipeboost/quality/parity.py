"""How far apart two results are, and whether an acceleration keeps the promise of its tier."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeboost.core.seams import add_layer, remove_layer
from pipeboost.quality.tuned_stock import stock_compile

FLOOR_MARGIN = 1.2
"""`lossless`: one forward's error may be this many times the error of stock's own compile."""
BALANCED_PSNR = 30.0
"""`balanced`: PSNR to stock of the finished result, dB."""
FAST_PSNR = 25.0
"""`fast`: the stated budget, PSNR to stock of the finished result, dB."""


def relative_error(ours: torch.Tensor, stock: torch.Tensor) -> float:
    """‖ours - stock‖ / ‖stock‖ in float64; infinite where ours is not finite."""
    ours, stock = ours.double(), stock.double()
    if not bool(torch.isfinite(ours).all()):
        return math.inf
    return float((ours - stock).norm() / stock.norm().clamp_min(1e-30))


def psnr(ours: np.ndarray, stock: np.ndarray, *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal arrays. `peak` defaults to the range of `stock`."""
    error = float(np.mean((ours.astype(np.float64) - stock.astype(np.float64)) ** 2))
    if error == 0:
        return math.inf
    spread = float(stock.max() - stock.min()) if peak is None else peak
    return 10 * math.log10(spread**2 / error)


def outputs_of(result: Any) -> dict[str, Any]:
    """What a pipeline or a transformer returned, by name where it has names, else by position."""
    if isinstance(result, Mapping):
        named: dict[str, Any] = dict(result)
    else:
        named = (
            {str(index): value for index, value in enumerate(result)} if isinstance(result, tuple) else {"0": result}
        )
    return {name: value for name, value in named.items() if _samples(value)}


def _samples(output: Any) -> list[torch.Tensor]:
    """The tensors, arrays or images of one output, which may be lists of them, as tensors."""
    if isinstance(output, (list, tuple)):
        return [sample for each in output for sample in _samples(each)]
    if isinstance(output, torch.Tensor):
        return [output.detach()]
    if isinstance(output, np.ndarray):
        return [torch.from_numpy(output)] if output.dtype.kind in "fiu" else []
    if isinstance(output, Image.Image):
        return [torch.from_numpy(np.asarray(output, dtype=np.float32) / 255)]
    return []


def flat(output: Any) -> torch.Tensor:
    """All numbers of one output in a row: of batches whose samples differ in size, too."""
    return torch.cat([sample.reshape(-1) for sample in _samples(output)])


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
    """

    quality: str
    passed: bool
    promise: str
    psnr: float
    max_difference: float
    forward_errors: dict[str, float] = field(default_factory=dict)
    noise_floor: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'passed' if self.passed else 'FAILED'}: {self.promise}"]
        for name, (ratio, difference) in self.outputs.items():
            of = f", {name}" if len(self.outputs) > 1 else ""
            lines.append(f"  whole call{of}: PSNR to stock {ratio:.1f} dB, largest difference {difference:.3g}")
        for name, error in self.forward_errors.items():
            floor = f", noise floor {self.noise_floor[name]:.3g}" if name in self.noise_floor else ""
            lines.append(f"  one forward of {name}: relative error {error:.3g}{floor}")
        return "\n".join(lines)


def verify_acceleration(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    quality: str,
    denoisers: Mapping[str, Any],
    paused: Callable[[], AbstractContextManager[Any]],
    opened: Callable[[], AbstractContextManager[Any]],
) -> Verification:
    """Compare `pipe(**call)` stock and accelerated, and one forward of each denoiser on the inputs stock gave it.

    Args:
        quality: the tier to check.
        denoisers: transformers by name.
        paused: context in which the pipeline runs stock.
        opened: context in which a direct forward of a denoiser runs accelerated.
    """
    first: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.Tensor]]] = {}
    with _rewound_generators(pipe, call) as rewind, paused(), _first_forwards(denoisers, first):
        stock = _flat_outputs(pipe(**rewind()))
    with _rewound_generators(pipe, call) as rewind:
        ours = _flat_outputs(pipe(**rewind()))
    whole = {}
    for name, expected in stock.items():
        difference = float((ours[name].double() - expected.double()).abs().max())
        whole[name] = psnr(ours[name].numpy(), expected.numpy()), difference
    ratio = min(ratio for ratio, _ in whole.values())
    difference = max(difference for _, difference in whole.values())
    errors: dict[str, float] = {}
    floors: dict[str, float] = {}
    if quality != "exact":
        for path, (args, kwargs, expected_outputs) in first.items():
            with torch.no_grad(), opened():
                found = _errors(path, denoisers[path](*args, **kwargs), expected_outputs)
            errors |= found
            if quality == "lossless" and any(found.values()):
                with torch.no_grad(), paused(), stock_compile(denoisers[path], fullgraph=True):
                    floors |= _errors(path, denoisers[path](*args, **kwargs), expected_outputs)
    promise, passed = _judge(quality, difference, ratio, errors, floors)
    return Verification(quality, passed, promise, ratio, difference, errors, floors, whole)


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
def _rewound_generators(pipe: Any, call: Mapping[str, Any]) -> Iterator[Callable[[], dict[str, Any]]]:
    given = call.get("generator")
    generators = given if isinstance(given, list) else [given] if given is not None else []
    states = [generator.get_state() for generator in generators]

    def arguments() -> dict[str, Any]:
        if generators:
            return dict(call)
        return {**call, "generator": torch.Generator("cpu").manual_seed(0)}

    try:
        yield arguments
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextlib.contextmanager
def _first_forwards(denoisers: Mapping[str, Any], into: dict[str, Any]) -> Iterator[None]:
    """Keep the arguments and output of each denoiser's first forward."""

    def keep(name: str) -> Callable[..., Any]:
        def layer(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
            if name in into:
                return call_next(*args, **kwargs)
            inputs = copy.deepcopy((args, kwargs))
            output = call_next(*args, **kwargs)
            into[name] = (*inputs, _flat_outputs(output))
            return output

        return layer

    layers = {name: keep(name) for name in denoisers}
    for name, layer in layers.items():
        add_layer(denoisers[name], "__call__", layer, place="component.verify")
    try:
        yield
    finally:
        for name, layer in layers.items():
            remove_layer(denoisers[name], "__call__", layer)


def _flat_outputs(result: Any) -> dict[str, torch.Tensor]:
    """A copy of each output of a call on the host."""
    return {name: flat(output).float().cpu().clone() for name, output in outputs_of(result).items()}


def _errors(path: str, result: Any, stock: Mapping[str, torch.Tensor]) -> dict[str, float]:
    ours = _flat_outputs(result)
    names = {name: path if len(stock) == 1 else f"{path}.{name}" for name in stock}
    return {names[name]: relative_error(ours[name], expected) for name, expected in stock.items()}
