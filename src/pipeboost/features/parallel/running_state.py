"""`RunningState`: what a call runs with on this rank, for comparison with the other ranks of its sample."""

from __future__ import annotations

import dis
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeboost.core.fingerprint import class_of, digest, identity
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.core.tracked_module import TrackedModule, configuration_of, settings_of
from pipeboost.distributed import suspend_timeout
from pipeboost.features.parallel.tensor import shares_of

PIPELINE = "pipeline"
_WRITING = ("fuse_lora", "unfuse_lora", "load_lora_adapter", "to", "half", "float", "double", "bfloat16")
_FROM_CALLS = (
    *("set_timesteps", "set_begin_index", "scale_model_input", "step", "scale_noise", "add_noise"),
    *("set_state", "prepare_models", "prepare_inputs", "forward", "cleanup_models", "__call__"),
)
"""Methods of schedulers and guiders that a pipeline's script calls; what they set is a call's, not the user's."""


class RunningState:
    """Digests of the components of a pipeline, and of its own configuration; it keeps no component alive.

    Devices do not count, nor does what tensor ranks have a share of, which they have compared before they split it.
    """

    def __init__(self) -> None:
        self._modules: weakref.WeakKeyDictionary[nn.Module, TrackedModule] = weakref.WeakKeyDictionary()
        self._others: dict[str, tuple[Any, bytes]] = {}

    def digests(self, pipe: Any, counts: Callable[[str], bool]) -> dict[str, bytes]:
        """Return the digest of each component, and of the `pipeline` itself.

        Args:
            counts: whether the component of a name counts.
        """
        components = pipe.components
        found = {PIPELINE: self._digest(PIPELINE, facts_of_pipeline(pipe, components))}
        for name, component in components.items():
            if counts(name) and isinstance(component, nn.Module):
                tracked = self._tracked(component)
                if not tracked.is_current:
                    with suspend_timeout(f"comparing {name}"):
                        tracked.digest()
                found[name] = tracked.digest()
            elif counts(name):
                found[name] = self._digest(name, facts_of(component))
        return found

    def facts(self, pipe: Any, name: str) -> Mapping[str, Any]:
        """Return what the digest of a name is of, by name; the component's own settings first."""
        if name == PIPELINE:
            return facts_of_pipeline(pipe, pipe.components)
        component = pipe.components.get(name)
        return self._tracked(component).facts() if isinstance(component, nn.Module) else facts_of(component)

    def watch(self, module: nn.Module, ledger: Ledger) -> None:
        """Look at all weights of a module again after methods that write to some in a way torch does not count."""
        tracked = self._tracked(module)

        def forget(method: str, call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
            converts = any(isinstance(each, (torch.dtype, torch.Tensor)) for each in (*args, *kwargs.values()))
            if method == "load_lora_adapter":
                tracked.forget(named="lora_")  # which may be exchanged where they lie
            elif method != "to" or converts:
                tracked.forget()
            return call_next(*args, **kwargs)

        for method in _WRITING:
            if callable(getattr(stock_class(module), method, None)):
                ledger.add_middleware(module, method, functools.partial(forget, method), place="component.writes")

    def _tracked(self, module: nn.Module) -> TrackedModule:
        if module not in self._modules:
            shares = shares_of(module)
            self._modules[module] = TrackedModule(module, frozenset() if shares is None else shares.names)
        return self._modules[module]

    def _digest(self, name: str, facts: Mapping[str, Any]) -> bytes:
        who, known = identity(facts), self._others.get(name)
        if known is None or known[0] != who:
            known = self._others[name] = (who, digest(facts))
        return known[1]


def facts_of(component: Any) -> dict[str, Any]:
    """Return the class of a component without weights, its configuration, and what was set on it between calls."""
    found: dict[str, Any] = {"class": class_of(component), **configuration_of(component)}
    if not hasattr(component, "__dict__"):
        return found
    cls = stock_class(component)
    in_calls = any(hasattr(cls, method) for method in ("set_timesteps", "set_state"))
    own = settings_of(component, private=in_calls)
    if in_calls:
        own |= {name: each for name, each in vars(component).items() if isinstance(each, (torch.Tensor, np.ndarray))}
        # A list with gaps is one that steps fill.
        gaps = {name for name, each in own.items() if isinstance(each, list) and None in each}
        own = {name: each for name, each in own.items() if name not in _set_by_calls(cls) | gaps}
    # Schedulers keep settings under the names that their configuration has.
    return found | {f"attribute {name}" if name in found else name: each for name, each in own.items()}


def facts_of_pipeline(pipe: Any, components: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class of a pipeline, its own configuration and settings, and those of its image processors."""
    own = {name: each for name, each in configuration_of(pipe).items() if name not in components}
    found = {"class": class_of(pipe), **own}
    found |= {name: each for name, each in settings_of(pipe).items() if name not in components and name not in found}
    for name, each in vars(pipe).items():
        if name not in components and name[0] != "_" and not isinstance(each, nn.Module):
            found |= {f"{name}.{key}": value for key, value in configuration_of(each).items()}
    return found


@functools.cache
def _set_by_calls(cls: type) -> frozenset[str]:
    """Return the attributes that a script's calls set anew: what an earlier call left in them does not matter."""
    waiting, seen, written = [*_FROM_CALLS], {*_FROM_CALLS}, set()
    while waiting:
        function = inspect.unwrap(getattr(cls, waiting.pop(), None) or int)
        if inspect.isfunction(function):
            for instruction in dis.get_instructions(function):
                if instruction.opname == "STORE_ATTR":
                    written.add(instruction.argval)
            mentioned = {*function.__code__.co_names} - seen
            seen |= mentioned
            waiting += mentioned
    return frozenset(written)
