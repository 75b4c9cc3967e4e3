"""Tuned stock: the best that Diffusers offers by itself, an attention backend and `compile_repeated_blocks`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.quality.timing import time_runs

NATIVE = "native"
_MARGIN = 1.02
"""Another backend must beat `native` by this factor: less is noise, and the noise floor is native's."""
_HOPELESS = 1.5
_CUDA_BACKENDS = ("_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "xformers")


def require_native_default() -> None:
    """Refuse to measure where the process already has another attention default: stock would not be stock.

    Raises:
        ConfigurationError: `DIFFUSERS_ATTN_BACKEND` or an earlier `set_attention_backend` chose another backend.
    """
    active = _AttentionBackendRegistry._active_backend.value
    if active != NATIVE:
        raise ConfigurationError(
            f"the default attention backend of Diffusers is {active!r} in this process, not {NATIVE!r}; "
            "unset DIFFUSERS_ATTN_BACKEND to benchmark stock"
        )


def rank_backends(
    model: Any, forward: Callable[[], Any], device: torch.device
) -> tuple[list[str], dict[str, float | str]]:
    """The exact-precision attention backends of Diffusers that run here, by a quick eager timing, quickest first.

    Args:
        model: the transformer, stock.
        forward: runs it.
        device: where it is; on a CPU `native` is the only candidate.

    Returns:
        The names of those that run, and for each candidate its milliseconds or why it does not run.
    """
    seen: dict[str, float | str] = {}
    milliseconds: dict[str, float] = {}
    for name in (NATIVE, *(_CUDA_BACKENDS if device.type == "cuda" else ())):
        try:
            with stock_attention(model, name):
                timing, _ = time_runs(forward, device, repeats=1, warm_ups=1)
                if timing.median < _HOPELESS * min(milliseconds.values(), default=timing.median):
                    timing, _ = time_runs(forward, device, repeats=3, warm_ups=0)
            seen[name] = milliseconds[name] = timing.median
        except Exception as error:
            seen[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    handicapped = {name: value * (1 if name == NATIVE else _MARGIN) for name, value in milliseconds.items()}
    return sorted(handicapped, key=lambda name: handicapped[name]), seen


@contextlib.contextmanager
def stock_attention(model: Any, backend: str) -> Iterator[None]:
    """Diffusers' own `set_attention_backend`, with the process-wide default that it flips put back."""
    before = _AttentionBackendRegistry._active_backend
    try:
        model.set_attention_backend(backend)
        yield
    finally:
        model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(before)


@contextlib.contextmanager
def stock_compile(model: Any, *, fullgraph: bool) -> Iterator[None]:
    """Diffusers' own regional compile, taken off again; what the user had compiled stays compiled.

    Raises:
        UnsupportedError: the model names no repeated blocks.
    """
    if not getattr(model, "_repeated_blocks", None):
        raise UnsupportedError(f"{type(model).__name__} names no repeated blocks for Diffusers' own compile")
    before = {module: vars(module).get("_compiled_call_impl") for module in model.modules()}
    try:
        model.compile_repeated_blocks(fullgraph=fullgraph)
        yield
    finally:
        for module, compiled in before.items():
            vars(module).pop("_compiled_call_impl", None)
            if compiled is not None:
                vars(module)["_compiled_call_impl"] = compiled


@contextlib.contextmanager
def cold_compile_caches() -> Iterator[None]:
    """Inside, nothing compiled before or outside is found, neither in this process nor on disk."""
    from torch._inductor.utils import fresh_cache

    forget_compiled()
    try:
        with fresh_cache():
            yield
    finally:
        forget_compiled()


def forget_compiled() -> None:
    """Drop every compiled graph of this process and the memory that nothing holds any longer."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
