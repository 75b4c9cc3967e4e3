"""Swap the attention processors of one model for ones that call our dispatcher, in place and per instance.

A processor's class gets a disguised subclass whose `__call__` is the stock function with one global exchanged:
`dispatch_attention_fn`. The processor object stays the same, with its state; only its `__class__` changes. There is one
subclass per stock class and dispatcher, because torch.compile guards on the class.
"""

from __future__ import annotations

import operator
import threading
import types
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from pipeboost.core.config import AttentionConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.core.ledger import Ledger
from pipeboost.core.obstacles import modules_of
from pipeboost.core.seams import disguised_subclass, stock_class
from pipeboost.features.attention.choice import check_choice
from pipeboost.features.attention.dispatcher import (
    ACROSS_RANKS,
    AttendAcross,
    Dispatcher,
    DispatcherSettings,
    dispatcher_for,
)

_GLOBAL = "dispatch_attention_fn"
_OURS = "__pipeboost_attention__"
_lock = threading.RLock()


class SwapReport(NamedTuple):
    """What became of a model's attention processors.

    Attributes:
        swapped: how many call our dispatcher.
        left: stock class name and reason, for each kind that was left alone.
    """

    swapped: int
    left: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, reasons: Sequence[tuple[type, str | None]]) -> SwapReport:
        """Report on processors, of each its class and why it was left alone, None where it was not."""
        left = {stock.__name__: reason for stock, reason in reasons if reason is not None}
        return cls(sum(reason is None for _, reason in reasons), tuple(sorted(left.items())))


class _Swap:
    """The processors of one model. Holds its attention modules, not the model."""

    def __init__(self, model: torch.nn.Module, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.modules = [module for module in model.modules() if hasattr(module, "processor")]
        self.changed: weakref.WeakSet[Any] = weakref.WeakSet()
        self.left: dict[type, str] = {}
        self.accelerated = _ids(dispatcher)

    def bind(self) -> None:
        """Accelerate every processor that is not yet ours."""
        for module in self.modules:
            cls = type(module.processor)
            if id(cls) not in self.accelerated and cls not in self.left:
                self._bind(module.processor)

    def _bind(self, processor: Any) -> None:
        stock = stock_class(processor)
        reason = _why_not(stock, across=self.dispatcher.settings.across is not None)
        if reason is not None:
            self.left[type(processor)] = reason
            return
        with _lock:
            subclass = self.dispatcher.subclasses.get(stock)
            if subclass is None:
                function: Any = stock.__call__
                call = _rebuilt(function, self.dispatcher, _reaching(function))
                members = {"__call__": call, _OURS: self.dispatcher}
                if self.dispatcher.settings.across is not None:
                    members["_parallel_config"] = ACROSS_RANKS
                # Dynamo reads the `__call__` of a processor that is a module, as adapters' are, from its class.
                shown = frozenset(["__call__"] if issubclass(stock, torch.nn.Module) else ())
                subclass = self.dispatcher.subclasses[stock] = disguised_subclass(stock, members, shown=shown)
            self.changed.add(processor)
            processor.__class__ = subclass
            self.accelerated = _ids(self.dispatcher)

    def report(self) -> SwapReport:
        present = [type(module.processor) for module in self.modules]
        known = [cls for cls in present if id(cls) in self.accelerated or cls in self.left]
        return SwapReport.of([(cls, self.left.get(cls)) for cls in known])


def _ids(dispatcher: Dispatcher) -> frozenset[int]:
    """Return the ids of our classes, which compare equal to the stock ones."""
    return frozenset(map(id, dispatcher.subclasses.values()))


_swaps: weakref.WeakKeyDictionary[torch.nn.Module, _Swap] = weakref.WeakKeyDictionary()


def swap_attention(
    model: torch.nn.Module,
    choice: AttentionConfig | str,
    ledger: Ledger,
    *,
    tier: str = "lossless",
    hardware: Hardware | None = None,
    right_padded: bool = False,
    across: AttendAcross | None = None,
) -> SwapReport:
    """Make the attention processors of one model call our dispatcher while a pipeline call of ours runs.

    Args:
        model: a Diffusers transformer; pipelines that share it share the change.
        choice: a backend name, `"auto"`, or the settings.
        ledger: takes the inverse: every processor of ours that the model then has becomes stock again, and so does
            every one that was swapped here and has been taken off the model since.
        tier: the quality tier, which bounds the choice.
        hardware: where the model will run (default: this machine's accelerator, else its CPU).
        right_padded: the model's key-padding masks always have their padding last.
        across: serves attention whose keys are shared among ranks.

    Raises:
        ConfigurationError: the tier does not allow the backend.
        MissingPackageError: the backend's package is not installed.
        UnsupportedError: the backend is not for this hardware, dtype or head dimension; the user has set a Diffusers
            backend on the model as well; the model is shared with a pipeline that uses another backend.
    """
    backend = choice if isinstance(choice, str) else choice.backend
    hardware = detect_hardware() if hardware is None else hardware
    head_dim = getattr(getattr(model, "config", None), "attention_head_dim", None)
    check_choice(
        backend,
        tier=tier,
        hardware=hardware,
        dtype=getattr(model, "dtype", None),
        head_dim=head_dim if isinstance(head_dim, int) else None,
    )
    _refuse_second_choice(model, backend)
    settings = DispatcherSettings(backend, tier, hardware, right_padded, across)

    # The ledger of a shared change must not keep its model alive.
    reference = weakref.ref(model)

    def apply(inner: Ledger) -> None:
        swap = _Swap(model, dispatcher_for(settings))
        inner.record(f"attention processors of {type(model).__name__}", lambda: _restore(reference(), swap))
        _swaps[model] = swap
        swap.bind()

    def explain(other: DispatcherSettings) -> str | None:
        if (other.across is None) == (across is None):
            return None
        first, second = ("share", "do not") if across is None else ("do not share", "do")
        return (
            f"whose ranks {first} its tokens, and those of this one {second}; give both of them ulysses or ring ranks, "
            "or neither,"
        )

    ledger.share(model, "attention", settings, apply, explain=explain)
    return _swaps[model].report()


def rebind_attention(model: torch.nn.Module) -> None:
    """Accelerate the processors that the user has put on a swapped model since; called at the start of every call."""
    _swaps[model].bind()


def refuse_stock_processors(model: torch.nn.Module, paths: Sequence[str]) -> None:
    """Refuse processors in these lists of blocks that do not call our dispatcher, for ranks that share a sequence.

    Raises:
        UnsupportedError: there is one; it would see a rank's own tokens only.
    """
    for path in paths:
        for block in operator.attrgetter(path)(model):
            for module in modules_of(block):
                processor = getattr(module, "processor", None)
                if processor is not None and _OURS not in type(processor).__dict__:
                    reason = _why_not(stock_class(processor), across=True)
                    raise UnsupportedError(
                        f"{type(processor).__name__} is not accelerated ({reason}), so ranks cannot share a sequence; "
                        "use ParallelConfig(ulysses=1, ring=1)"
                    )


def dispatcher_of(model: torch.nn.Module) -> Dispatcher:
    """Return the dispatcher of a swapped model, whose `attend` other features wrap."""
    return _swaps[model].dispatcher


def swappable_processors(model: torch.nn.Module) -> SwapReport:
    """Return what `swap_attention` would do to a model, without doing it."""
    stock = [stock_class(module.processor) for module in model.modules() if hasattr(module, "processor")]
    reasons = {cls: _why_not(cls) for cls in set(stock)}
    return SwapReport.of([(cls, reasons[cls]) for cls in stock])


def _restore(model: torch.nn.Module | None, swap: _Swap) -> None:
    if model is None:
        return
    _swaps.pop(model, None)
    current = [module.processor for module in model.modules() if hasattr(module, "processor")]
    for processor in (*current, *swap.changed):
        if _OURS in type(processor).__dict__:
            processor.__class__ = stock_class(processor)


def _refuse_second_choice(model: torch.nn.Module, backend: str) -> None:
    if backend == "auto":
        return
    for module in model.modules():
        chosen = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if chosen is not None:
            raise UnsupportedError(
                f"attention={backend!r} contradicts the backend {str(getattr(chosen, 'value', chosen))!r} that "
                f"{type(model).__name__}.set_attention_backend() has set; call its reset_attention_backend() first"
            )


def _why_not(stock: type, *, across: bool = False) -> str | None:
    function = stock.__call__
    if not isinstance(function, types.FunctionType):
        return "its __call__ is not a plain function"
    callers = [each for each in _reaching(function) if _GLOBAL in _names(each.__code__)]
    if not callers:
        return "it calls its attention kernel itself"
    if across and not all("parallel_config" in _names(each.__code__) for each in callers):
        return "it does not tell its attention kernel of other ranks"
    return None


def _reaching(function: types.FunctionType, seen: frozenset[types.FunctionType] = frozenset()) -> set[Any]:
    """Return the function and its helpers, as far as they call `dispatch_attention_fn` or a helper that does."""
    scope, found = function.__globals__, set()
    for name in _names(function.__code__):
        value = scope.get(name)
        if value is dispatch_attention_fn and name == _GLOBAL:
            found.add(function)
        elif isinstance(value, types.FunctionType) and value.__globals__.get(_GLOBAL) is dispatch_attention_fn:
            helpers = _reaching(value, seen | {function}) if value not in {*seen, function} else None
            found |= {function, *helpers} if helpers else set()
    return found


def _names(code: types.CodeType) -> set[str]:
    """Return the globals, attributes and call keywords that a function names."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
        elif isinstance(constant, tuple):
            found.update(each for each in constant if isinstance(each, str))
    return found


def _rebuilt(function: types.FunctionType, dispatcher: Dispatcher, reaching: set[Any]) -> types.FunctionType:
    """Return the function with our dispatcher in place of the stock one, also in the helpers it reaches it through."""
    scope = {**function.__globals__, _GLOBAL: dispatcher.dispatch}
    for name in _names(function.__code__) & scope.keys():
        helper = scope[name]
        if isinstance(helper, types.FunctionType) and helper in reaching and helper is not function:
            scope[name] = _rebuilt(helper, dispatcher, reaching - {function})
    # With a module's name in it dynamo would take the scope for that module's and guard on the stock global. Relative
    # imports inside the function go by `__package__`.
    del scope["__name__"]
    defaults, closure = function.__defaults__, function.__closure__
    twin = types.FunctionType(function.__code__, scope, function.__name__, defaults, closure)
    for name in ("__kwdefaults__", "__annotations__", "__qualname__", "__module__", "__doc__"):
        setattr(twin, name, getattr(function, name))
    return twin
