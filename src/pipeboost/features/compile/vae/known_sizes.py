"""Which sizes of a VAE were compiled before, here or in another process, so that their code is at hand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeboost.core.own_folder import compiled_folder, kept_in, why_not_own
from pipeboost.core.seams import Middleware, stock_class
from pipeboost.features.compile.region import CompiledModel


def key_of(vae: nn.Module) -> str:
    """Return what stands for a VAE's class, configuration and dtype, and for the torch that compiles it.

    Where it was loaded from does not count, so that it is found again by another path.
    """
    settings = {name: value for name, value in dict(getattr(vae, "config", None) or {}).items() if name[0] != "_"}
    config = json.dumps(settings, sort_keys=True, default=str)
    dtype = next((str(parameter.dtype) for parameter in vae.parameters()), "")
    described = (stock_class(vae).__qualname__, config, dtype, torch.__version__)
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:24]


def known_sizes(key: str, hardware: str) -> frozenset[str]:
    """Return the names of the sizes that were compiled for a device, as `name_of` gives them."""
    folder = kept_in(os.environ)
    with contextlib.suppress(OSError):
        if why_not_own(folder) is None:
            return frozenset(path.name for path in (folder / _path(key, hardware)).iterdir())
    return frozenset()


def name_of(part: str, states: torch.Tensor, *, dynamic: bool) -> str:
    """Return the name of a size: of the encoder or decoder, and its input, of which a dynamic graph takes any."""
    shape = "any" if dynamic else "x".join(map(str, states.shape))
    return f"{part}-{shape}-{str(states.dtype).removeprefix('torch.')}"


def noting_sizes(part: str, key: str, hardware: str, compiled: CompiledModel, *, dynamic: bool) -> Middleware:
    """Note each size that is compiled."""

    def note(call_next: Callable[..., Any], owner: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = compiled.counters.graphs
        result = call_next(states, *args, **kwargs)
        if compiled.counters.graphs > before:
            folder = compiled_folder() / _path(key, hardware)
            with contextlib.suppress(OSError):  # then it is compiled when asked for only
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                (folder / name_of(part, states, dynamic=dynamic)).touch()
        return result

    return note


def only_sizes(part: str, known: frozenset[str], *, dynamic: bool) -> Middleware:
    """Run the part compiled for sizes whose code is at hand, and stock for others."""

    def choose(call_next: Callable[..., Any], owner: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if name_of(part, states, dynamic=dynamic) in known:
            return call_next(states, *args, **kwargs)
        return stock_class(owner).__call__(owner, states, *args, **kwargs)

    return choose


def _path(key: str, hardware: str) -> Path:
    return Path("vae") / f"{key}-{hashlib.sha256(hardware.encode()).hexdigest()[:8]}"
