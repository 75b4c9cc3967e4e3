"""`QuantizedModel`: the linears of one transformer, in 8 bits in our calls and as they were everywhere else.

Outside of our calls, and before anything reads or changes weights, the original linears are back. They come back at
the next forward that needs them, and so do those in 8 bits, made anew of whatever weights are there then. So a LoRA is
fused into, and a checkpoint saved from, the weights as they were. Other threads' forwards end before anything changes
places; two threads that call one transformer in the two ways by turns are right, and slow.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeboost.contract.call import current_call
from pipeboost.core.config import QuantizeConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.distributed import suspend_timeout
from pipeboost.features.quantize.host import HostMemory
from pipeboost.features.quantize.linear import Float8Linear, dequantised_linear
from pipeboost.features.quantize.select import Place, linears_of

READING = (
    *("load_lora_adapter", "save_lora_adapter", "add_adapter", "delete_adapters", "unload_lora"),
    *("fuse_lora", "unfuse_lora", "fuse_qkv_projections", "unfuse_qkv_projections"),
    *("state_dict", "load_state_dict", "save_pretrained", "half", "float", "double", "bfloat16", "type"),
    "requires_grad_",
    *("enable_group_offload", "enable_layerwise_casting"),
)
"""Methods of a transformer that read, write or convert weights, or wrap linears or put hooks on them."""
READING_OF_PIPE = (
    *("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
    "unfuse_lora",
)
"""Methods of a pipeline that put hooks on linears, which then keep their precision, or write to weights past the model.
"""
_TURNING_OFF = ("disable_lora", "disable_adapters")
"""Methods after which an adapter that is merged takes itself out of the weights."""


@dataclass
class Counts:
    """What quantising one transformer came to in this process.

    Attributes:
        linears: that have 8 bits now.
        left: reason → linears of its blocks that keep their precision.
        nbytes: of the weights in 8 bits, scales included.
        host_bytes: of the host's memory that holds the weights as they were.
        quantised: how often they were quantised.
        restored: how often the weights were put back, before `remove()`.
        seconds: how long all of that took.
    """

    linears: int = 0
    left: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    host_bytes: int = 0
    quantised: int = 0
    restored: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Return the counts as a report shows them."""
        return {**vars(self), "left": dict(self.left)}


class QuantizedModel:
    """The linears of one transformer. Holds none of them: a dropped model frees its memory at once.

    Args:
        model: the transformer.
        settings: what the user asked for.
        family: which of its linears keep their precision.
        device: where to quantise weights that wait on the host; None for where they lie.

    Attributes:
        counts: what it came to.
    """

    def __init__(self, model: nn.Module, settings: QuantizeConfig, family: Family, device: torch.device | None) -> None:
        self.counts = Counts()
        self._model = weakref.ref(model)
        self._settings = settings
        self._family = family
        self._device = device
        self._changed: list[_Changed] = []
        self._quantised = False
        self._forwards = _Forwards()

    def requantise(self) -> None:
        """Do as `quantise`, and also where the user has put another linear in the place of one."""
        if any(each.in_place() is None for each in tuple(self._changed)):
            self._quantised = False  # never True, for another thread may be restoring them
        self.quantise()

    def quantise(self) -> None:
        """Put linears in 8 bits in the places of those that there are, where that was undone since.

        Raises:
            UnsupportedError: the host cannot hold the weights as they were.
        """
        model = self._model()
        if self._quantised or model is None:
            return
        with self._forwards.none(), suspend_timeout("quantising weights"), torch.inference_mode(False), torch.no_grad():
            start = time.perf_counter()
            linears, left = linears_of(model, self._family)
            memory = HostMemory()
            self.counts.left = dict(left)
            linears.reverse()
            while linears:  # which must not keep alive what is not to be kept
                self._replace(*linears.pop(), memory)
            self._changed = [each for each in self._changed if each.in_place() is not None]
            self._quantised = True
            self.counts.quantised += 1
            self._count(start)

    def restore(self, *, doing: str = "") -> None:
        """Put the original linears back, where that was not done yet.

        Args:
            doing: what needs them, as the subject of a sentence; empty for the removal.

        Raises:
            UnsupportedError: they were not kept, and something needs them.
        """
        if not self._changed:
            self._quantised = False
            return
        if not self._settings.reversible and doing:
            raise UnsupportedError(
                f"{doing} needs the weights as they were, of which QuantizeConfig(reversible=False) kept none; use "
                "reversible=True, or do it before accelerate_pipeline()"
            )
        with self._forwards.none(), suspend_timeout("restoring weights"), torch.inference_mode(False), torch.no_grad():
            start = time.perf_counter()
            self._quantised = False
            while self._changed:
                self._changed[-1].restore()
                self._changed.pop()
            self.counts.restored += bool(doing)
            self._count(start)

    def undo(self) -> None:
        """Put back what can be, for good."""
        approximate = bool(self._changed) and not self._settings.reversible
        self.restore()
        if approximate:
            model = self._model()
            warnings.warn(
                f"the weights of {'the transformer' if model is None else stock_class(model).__name__} stay as 8 bits "
                "have them, since QuantizeConfig(reversible=False) kept no others; load the model again for stock's",
                stacklevel=2,
            )

    def run(self, call_next: Callable[..., Any], owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a forward with the weights of its call: the middleware on the model's call."""
        call = current_call()
        in_8_bits = call is not None and call.has("quantize")
        with self._forwards.one(self.quantise if in_8_bits else self._restore_for_stock):
            return call_next(*args, **kwargs)

    def read(self, method: str, call_next: Callable[..., Any], owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the model that is to see the weights as they were: the middleware on each of these."""
        if method == "to" and not any(
            isinstance(each, (torch.dtype, torch.Tensor)) for each in (*args, *kwargs.values())
        ):
            return call_next(*args, **kwargs)
        if method not in _TURNING_OFF or any(vars(part).get("merged_adapters") for part in owner.modules()):
            self.restore(doing=f"{method}()")
        return call_next(*args, **kwargs)

    def _restore_for_stock(self) -> None:
        self.restore(doing="a call outside of the acceleration")

    def _replace(self, place: Place, linear: nn.Linear, memory: HostMemory) -> None:
        if place.parent._modules.get(place.name) is not linear:  # but what stands for it
            return
        weight = linear.weight
        device = self._device if weight.device.type == "cpu" else None
        ours = Float8Linear(linear, device=device, reversible=self._settings.reversible)
        self._changed.append(_Changed(weakref.ref(place.parent), place.name, weakref.ref(ours)))
        place.parent._modules[place.name] = ours
        if self._settings.reversible and weight.device.type == "cuda":
            weight.data = memory.copy_of(weight.data)

    def _count(self, start: float) -> None:
        linears = [ours for each in self._changed if (ours := each.in_place()) is not None]
        self.counts.linears = len(linears)
        self.counts.nbytes = sum(each.weight.nbytes + each.weight_scale.nbytes for each in linears)
        originals = [each.original for each in linears]
        self.counts.host_bytes = sum(each.weight.nbytes for each in originals if each is not None)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # where weights of another size were, no large buffer fits
        self.counts.seconds += time.perf_counter() - start


def quantise_model(
    model: nn.Module, settings: QuantizeConfig, family: Family, ledger: Ledger, *, device: torch.device | None = None
) -> QuantizedModel:
    """Run the linears of a transformer's blocks in 8 bits inside our calls; undone by the ledger.

    Args:
        device: where to quantise weights that wait on the host; None for where they lie.

    Raises:
        UnsupportedError: the host cannot hold the weights as they were, or another pipeline quantised the model with
            other settings.
    """

    def apply(inner: Ledger) -> None:
        quantised = QuantizedModel(model, settings, family, device)
        inner.record("quantised model", functools.partial(_forget, weakref.ref(model)))
        inner.record("linears in 8 bits", quantised.undo)
        _quantised[model] = quantised
        quantised.quantise()
        inner.add_middleware(model, "__call__", quantised.run, place="component.quantize")
        for method in (*READING, *_TURNING_OFF, "to"):
            if callable(getattr(stock_class(model), method, None)):
                read = functools.partial(quantised.read, method)
                inner.add_middleware(model, method, read, place="component.writes")

    ledger.share(model, "quantize", settings, apply)
    return _quantised[model]


def restore_before_pipe_reads(pipe: Any, family: Family, ledger: Ledger) -> None:
    """Have the weights as they were before the pipeline's own methods put hooks on them, or write to them."""

    def restore(method: str, call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        for model in family.models(owner).values():
            if (quantised := quantised_model(model)) is not None:
                quantised.restore(doing=f"{method}()")
        return call_next(*args, **kwargs)

    for method in READING_OF_PIPE:
        if callable(getattr(stock_class(pipe), method, None)):
            ledger.add_middleware(pipe, method, functools.partial(restore, method), place="pipe.quantize")


_quantised: weakref.WeakKeyDictionary[nn.Module, QuantizedModel] = weakref.WeakKeyDictionary()


def quantised_model(model: nn.Module) -> QuantizedModel | None:
    """Return what `quantise_model` made of a model; None where it was not called."""
    return _quantised.get(model)


def _forget(reference: weakref.ref[nn.Module]) -> None:
    model = reference()
    if model is not None:
        _quantised.pop(model, None)


class _Changed(NamedTuple):
    """A linear in 8 bits, and the module that has it under a name."""

    parent: weakref.ref[nn.Module]
    name: str
    ours: weakref.ref[Float8Linear]

    def in_place(self) -> Float8Linear | None:
        """Return the linear, if it is still where it was put."""
        parent, ours = self.parent(), self.ours()
        return ours if parent is not None and parent._modules.get(self.name) is ours else None

    def restore(self) -> None:
        """Put the original in its place, unless the user has put something there."""
        parent, ours = self.parent(), self.in_place()
        if parent is not None and ours is not None:
            parent._modules[self.name] = _restored(ours)


def _restored(ours: Float8Linear) -> nn.Linear:
    """Return the linear that one in 8 bits stands for, its weight where that of the other is now."""
    original = ours.original
    if original is None:
        return dequantised_linear(ours)
    weight, device = original.weight, ours.weight.device
    if weight.device != device or weight.is_pinned():
        weight.data = weight.data.to(device, copy=True)
    # A parameter that was moved may be another one.
    original._parameters["bias"] = ours._parameters["bias"]
    original.training = ours.training
    return original


class _Forwards:
    """The forwards of a model that run, each in its thread; nothing changes places under one of another thread."""

    def __init__(self) -> None:
        self._threads: Counter[int] = Counter()
        self._condition = threading.Condition(threading.RLock())

    @contextlib.contextmanager
    def one(self, prepare: Callable[[], None]) -> Iterator[None]:
        """Inside, a forward runs, and the weights are as `prepare` has left them."""
        own = threading.get_ident()
        with self._condition:
            prepare()
            self._threads[own] += 1
        try:
            yield
        finally:
            with self._condition:
                self._threads[own] -= 1
                if not self._threads[own]:
                    del self._threads[own]
                    self._condition.notify_all()

    @contextlib.contextmanager
    def none(self) -> Iterator[None]:
        """Inside, no forward of another thread runs or begins."""
        own = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: not self._threads.keys() - {own})
            yield
