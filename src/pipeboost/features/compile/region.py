"""A region: one compiled function for all modules of one class, so that one graph serves every block of a list.

Dynamo keeps its graphs on a code object and counts them against process-wide limits. A region has a code object of its
own, and changes Dynamo's settings only while it compiles, under Dynamo's compile lock: nothing else in the process sees
them, and a call that finds its graph pays nothing for it.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
import time
import types
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import pgo
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import _debug_get_cache_entry_list, remove_from_cache
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch.fx.experimental import _config as _shape_config

from pipeboost.contract.call import tracing_our_call
from pipeboost.core.config import CompileConfig
from pipeboost.core.errors import PipeboostError
from pipeboost.core.obstacles import hooks_in
from pipeboost.core.seams import stock_class
from pipeboost.distributed import suspend_timeout
from pipeboost.features.compile.artifacts import artifacts
from pipeboost.features.compile.rewrites import RewritingBackend

# Dynamo's own limits count the graphs of all models of a class, dropped ones included; ours counts one model's.
_UNLIMITED = 2**31 - 1
# Where adapters keep the numbers that scale them: LoRA's kin in a dict by name, IP-Adapters in a list.
_ADAPTER_SCALE = re.compile(r"\.scal(ing|e)\[")
_SHAPE_CONFIG: Any = _shape_config

_regions: weakref.WeakValueDictionary[tuple[type, CompileConfig, bool], Region] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class NotCaptured(Exception):  # noqa: N818 - not an error: the module runs eager
    """Why a module runs eager, in words that follow its class.

    Attributes:
        for_good: whether trying again is of no use.
    """

    def __init__(self, reason: str, *, for_good: bool = False) -> None:
        super().__init__(reason)
        self.for_good = for_good


@dataclass
class Counters:
    """What compiling cost one model in this process.

    Attributes:
        graphs: how many graphs were compiled.
        seconds: how long that took.
        rewrites: rewrite → how often it was made in these graphs.
        eager: reason → forwards of its modules that ran eager for it.
    """

    graphs: int = 0
    seconds: float = 0.0
    rewrites: dict[str, int] = field(default_factory=dict)
    eager: dict[str, int] = field(default_factory=dict)


class CompiledModel:
    """What was compiled of a model, and what it cost so far in this process.

    Attributes:
        modules: how many modules run compiled.
        classes: their class names; each costs one graph per image size.
        counters: what that cost.
        owners: the accelerations in whose calls it runs compiled.
        every_call: whether it does in all calls.
        scales_vary: whether one graph is for all scales of its adapters; False once the code of one could not be
            captured so.
    """

    def __init__(self, model: nn.Module, modules: int, classes: tuple[str, ...]) -> None:
        self.modules = modules
        self.classes = classes
        self.counters = Counters()
        self.owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self.every_call = False
        self.scales_vary = True
        self._model = weakref.ref(model)

    def adapters(self) -> list[Any]:
        """Return the configurations of the adapters that the model has now: other objects once they are loaded anew."""
        return list((getattr(self._model(), "peft_config", None) or {}).values())

    def summary(self) -> dict[str, Any]:
        """Return the counts as a report shows them."""
        return asdict(self.counters)


class Found:
    """The adapters that a model had when something was found of it: a graph, or that there is none."""

    def __init__(self, model: CompiledModel) -> None:
        self._model = weakref.ref(model)
        self._adapters = [weakref.ref(adapter) for adapter in model.adapters()]

    def of(self, model: CompiledModel) -> bool:
        """Whether this is the model."""
        return self._model() is model

    @property
    def is_past(self) -> bool:
        """Whether one of the adapters was unloaded since."""
        model = self._model()
        loaded = [] if model is None else model.adapters()
        return any(all(each() is not other for other in loaded) for each in self._adapters)


class _Sizes(dict[str, pgo.FrameStateSizeEntry]):
    """What Dynamo knows of the numbers that a region was given: which vary, so that graphs must fit all their values.

    An adapter's scale does, where its code allows it. The size of a tensor does once it was seen to vary, where that
    may be learned.

    Attributes:
        scales: whether scales vary in what is compiled now.
        met_scale: whether one was met since that was set.
    """

    def __init__(self, learn: bool) -> None:
        super().__init__()
        self._learn = learn
        self.scales = True
        self.met_scale = False

    def __missing__(self, source: str) -> pgo.FrameStateSizeEntry:
        entry = pgo.FrameStateSizeEntry()
        if _ADAPTER_SCALE.search(source):
            self.met_scale = True
            if self.scales:
                entry.scalar = pgo.auto_dynamic
        elif self._learn:
            self[source] = entry
        return entry


class Region:
    """The compiled `__call__` of one class of modules.

    Attributes:
        module_class: the stock class.
        settings: what the user asked for.
        backend: what compiles its graphs.
        learn_sizes: whether Dynamo may make a size dynamic when it sees it change, as it does by default: right where
            nobody declared which sizes follow the prompt, slower for an image size that changes once.
    """

    def __init__(self, module_class: type, settings: CompileConfig, learn_sizes: bool) -> None:
        self.module_class = module_class
        self.settings = settings
        self.learn_sizes = learn_sizes
        self._generation = 0
        entry = _entry_of(module_class)
        self._code = entry.__code__
        self._sizes = _Sizes(learn_sizes)
        # torch 2.11 knows code by where it is written, later versions by what it closes over too.
        known_by: Any = (entry.__code__, entry.__closure__)[: len(inspect.signature(pgo.CodeId.make).parameters)]
        self._state_key = pgo.CodeId.make(*known_by)
        self._made: weakref.WeakKeyDictionary[Any, Found] = weakref.WeakKeyDictionary()
        self.backend = RewritingBackend(settings.backend, settings.rewrites)
        context: Any = torch._dynamo.optimize(self.backend, nopython=True)
        context.callback = _Compiler(self, context.callback)
        self._compiled = context(entry)
        # The graphs hold on to the code object that holds them, out of the garbage collector's sight.
        weakref.finalize(self, remove_from_cache, entry.__code__).atexit = False

    def __call__(self, model: CompiledModel, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `module(*args, **kwargs)` compiled; what is compiled on the way is put down to `model`.

        Raises:
            NotCaptured: there is no graph that fits, and none can be made; nothing has run.
        """
        while True:
            try:
                return self._compiled(model, module, *args, **kwargs)
            except _CompiledMeanwhile:
                # Give the other thread, which has its graph in hand, the moment it needs to store it.
                time.sleep(0.001)

    def make_room(self, model: CompiledModel) -> None:
        """Drop a graph of unloaded adapters, the one longest out of use, where the model is at its limit.

        Raises:
            NotCaptured: all its graphs are of what it has now.
        """
        limit = self.settings.recompile_limit
        entries = [(entry, self._made.get(entry.guard_manager)) for entry in _debug_get_cache_entry_list(self._code)]
        own = [(entry, made) for entry, made in entries if made is not None and made.of(model)]
        if len(own) < limit:
            return
        dead = next((entry for entry, made in reversed(own) if made.is_past), None)
        if dead is None:
            raise NotCaptured(
                f"has compile.recompile_limit={limit} graphs and needs another; raise the limit, or use "
                "CompileConfig(dynamic=True) for many sizes"
            )
        manager = dead.guard_manager
        del self._made[manager]
        assert manager.extra_state is not None
        manager.extra_state.invalidate(dead, DeletedGuardManagerWrapper("its adapters were unloaded"))

    @contextlib.contextmanager
    def knowing_sizes(self) -> Iterator[_Sizes]:
        """Inside, Dynamo finds under this region's code what the region knows of sizes."""
        states = pgo.get_code_state()
        states[self._state_key] = pgo.CodeState(self._sizes)  # type: ignore[arg-type]
        try:
            yield self._sizes
        finally:
            states.pop(self._state_key, None)


def region_of(module: nn.Module, settings: CompileConfig, *, learn_sizes: bool = False) -> Region:
    """The region of a module's class: the same one for all models, so that two experts share their graphs."""
    key = (stock_class(module), settings, learn_sizes)
    with _lock:
        region = _regions.get(key)
        if region is None:
            region = _regions[key] = Region(*key)
        return region


class _CompiledMeanwhile(Exception):  # noqa: N818 - not an error
    """Another thread compiled while this one waited for the lock: look for the graph again."""


@dataclass
class _Compiler:
    """Stands before the callback that Dynamo invokes where no graph fits, and sets Dynamo up for its length."""

    region: Region
    callback: Any
    _torchdynamo_orig_backend: Any = field(init=False)

    def __post_init__(self) -> None:
        # Dynamo reads the backend's identity through this chain.
        self._torchdynamo_orig_backend = self.callback._torchdynamo_orig_backend

    def __call__(self, frame: Any, *details: Any) -> Any:
        if frame.f_code is not self.region._code:
            return self.callback(frame, *details)
        region, settings, model = self.region, self.region.settings, frame.f_locals["model"]
        hooks = hooks_in(frame.f_locals["module"])
        if hooks is not None:
            raise NotCaptured(f"has {hooks}")
        generation = region._generation
        with (
            compile_lock,
            dynamo_config.patch(
                recompile_limit=_UNLIMITED,
                accumulated_recompile_limit=_UNLIMITED,
                automatic_dynamic_shapes=True,
                assume_static_by_default=not settings.dynamic,
                # A block that has a hook must not run on the graph of one that has none.
                skip_nnmodule_hook_guards=False,
            ),
            _SHAPE_CONFIG.patch(use_duck_shape=False),
            region.knowing_sizes() as sizes,
            tracing_our_call(),
            artifacts(settings.backend),
        ):
            if region._generation != generation:
                raise _CompiledMeanwhile
            region.make_room(model)
            start = time.perf_counter()
            sizes.scales, sizes.met_scale = model.scales_vary, False
            region.backend.found.clear()
            with suspend_timeout("compiling"):
                try:
                    try:
                        result = self.callback(frame, *details)
                    except Exception:
                        if not (sizes.scales and sizes.met_scale):
                            raise
                        sizes.scales = False
                        region.backend.found.clear()
                        result = self.callback(frame, *details)
                        model.scales_vary = False
                except PipeboostError:
                    raise
                except Exception as error:
                    cause = getattr(error, "inner_exception", error)
                    reason = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
                    raise NotCaptured(f"cannot be compiled ({reason})", for_good=True) from error
            region._made[result.guarded_code.guard_manager] = Found(model)
            region._generation += 1
            model.counters.graphs += 1
            for name, count in region.backend.found.items():
                model.counters.rewrites[name] = model.counters.rewrites.get(name, 0) + count
            model.counters.seconds += time.perf_counter() - start
            return result


def _entry_of(module_class: type) -> types.FunctionType:
    """A function that calls a module as its stock class would.

    Its code object, on which Dynamo hangs graphs, and its globals, in which Dynamo keeps them, are its own.
    """
    stock_call = module_class.__call__

    def call_module(model: CompiledModel, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return stock_call(module, *args, **kwargs)

    own_code = call_module.__code__.replace(co_name=f"compiled_{module_class.__name__}")
    own_globals = {name: globals()[name] for name in ("__name__", "__builtins__")}
    return types.FunctionType(own_code, own_globals, own_code.co_name, None, call_module.__closure__)
