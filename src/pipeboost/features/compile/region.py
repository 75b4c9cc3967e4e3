"""A region: one compiled function for all modules of one class, so that one graph serves every block of a list.

Dynamo keeps its graphs on a code object and counts them against process-wide limits. A region has a code object of its
own, and changes Dynamo's settings only while it compiles, under Dynamo's compile lock: nothing else in the process sees
them, and a call that finds its graph pays nothing for it.
"""

from __future__ import annotations

import threading
import time
import types
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import remove_from_cache
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch.fx.experimental import _config as _shape_config

from pipeboost.contract.call import tracing_our_call
from pipeboost.core.config import CompileConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.seams import stock_class
from pipeboost.distributed import suspend_timeout

# Graphs ever made for one code object, dropped ones included; a server that swaps adapters for weeks passes any number.
_UNLIMITED = 2**31 - 1
_SHAPE_CONFIG: Any = _shape_config

_regions: weakref.WeakValueDictionary[tuple[type, CompileConfig, bool], Region] = weakref.WeakValueDictionary()
_lock = threading.Lock()


@dataclass
class Counters:
    """What compiling cost one model in this process.

    Attributes:
        graphs: how many graphs were compiled.
        seconds: how long that took.
    """

    graphs: int = 0
    seconds: float = 0.0


class Region:
    """The compiled `__call__` of one class of modules.

    Attributes:
        module_class: the stock class.
        settings: what the user asked for.
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
        context: Any = torch._dynamo.optimize(settings.backend, nopython=True)
        context.callback = _Compiler(self, context.callback)
        self._compiled = context(entry)
        # The graphs hold on to the code object that holds them, out of the garbage collector's sight.
        weakref.finalize(self, remove_from_cache, entry.__code__).atexit = False

    def __call__(self, counters: Counters, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `module(*args, **kwargs)` compiled; what is compiled on the way is put down to `counters`.

        Raises:
            UnsupportedError: the module cannot be captured as one graph, or the settings' `recompile_limit` is reached.
        """
        while True:
            try:
                return self._compiled(counters, module, *args, **kwargs)
            except _CompiledMeanwhile:
                # Give the other thread, which has its graph in hand, the moment it needs to store it.
                time.sleep(0.001)
            except Unsupported as error:
                raise UnsupportedError(
                    f"{self.module_class.__name__} cannot be compiled ({str(error).splitlines()[0]}); hooks inside a "
                    "block, as of sequential or group offload and layerwise casting, prevent it: use compile=None"
                ) from error
            except FailOnRecompileLimitHit as error:
                raise UnsupportedError(
                    f"{self.module_class.__name__} was compiled compile.recompile_limit="
                    f"{self.settings.recompile_limit} times and needs another graph; raise the limit, use "
                    "CompileConfig(dynamic=True) for many sizes, or compile=None"
                ) from error


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
        settings = self.region.settings
        generation = self.region._generation
        with (
            compile_lock,
            dynamo_config.patch(
                recompile_limit=settings.recompile_limit,
                accumulated_recompile_limit=_UNLIMITED,
                automatic_dynamic_shapes=self.region.learn_sizes,
                assume_static_by_default=not settings.dynamic,
                # A block that has a hook must not run on the graph of one that has none.
                skip_nnmodule_hook_guards=False,
            ),
            _SHAPE_CONFIG.patch(use_duck_shape=False),
            tracing_our_call(),
        ):
            if self.region._generation != generation:
                raise _CompiledMeanwhile
            start = time.perf_counter()
            with suspend_timeout("compiling"):
                result = self.callback(frame, *details)
            self.region._generation += 1
            counters: Counters = frame.f_locals["counters"]
            counters.graphs += 1
            counters.seconds += time.perf_counter() - start
            return result


def _entry_of(module_class: type) -> types.FunctionType:
    """A function that calls a module as its stock class would.

    Its code object, on which Dynamo hangs graphs, and its globals, in which Dynamo keeps them, are its own.
    """
    stock_call = module_class.__call__

    def call_module(counters: Counters, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return stock_call(module, *args, **kwargs)

    own_code = call_module.__code__.replace(co_name=f"compiled_{module_class.__name__}")
    own_globals = {name: globals()[name] for name in ("__name__", "__builtins__")}
    return types.FunctionType(own_code, own_globals, own_code.co_name, None, call_module.__closure__)
