"""The dispatcher: what accelerated attention processors call in place of Diffusers' `dispatch_attention_fn`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from pipeboost.contract.call import current_call, is_tracing_our_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.features.attention.choice import choose_kernel, refusal
from pipeboost.kernels.key_padding import mask_kind
from pipeboost.kernels.table import KERNELS, as_installed, available_kernels, refuses
from pipeboost.kernels.torch_native import Attended


class AttendAcross(Protocol):
    """Attention among the tokens of several ranks. Hashable by identity."""

    def serve(self, attend: Callable[..., Any]) -> None:
        """Use the bound method `attend` for attention on one rank."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, scale: float | None
    ) -> torch.Tensor:
        """Compute attention of this rank's queries to the keys of all ranks."""


class _AcrossRanks:
    """Stands in a processor's `_parallel_config`, which it hands on where its keys are shared among ranks."""


ACROSS_RANKS = _AcrossRanks()


@dataclass(frozen=True)
class DispatcherSettings:
    """What makes two dispatchers the same one.

    Attributes:
        backend: a name of `KERNELS`, or `"auto"`.
        tier: the quality tier, which bounds what `"auto"` may choose.
        hardware: the device that the plan was made for.
        right_padded: key-padding masks are known to have their padding last, so keys need not be moved.
        across: serves attention whose keys are shared among ranks; None on one device.
    """

    backend: str
    tier: str
    hardware: Hardware
    right_padded: bool = False
    across: AttendAcross | None = None

    def __repr__(self) -> str:
        ranks = ", across ranks" if self.across is not None else ""
        return f"{self.backend!r} (quality={self.tier!r}{ranks})"


class Dispatcher:
    """Chooses a kernel for a call and runs it, on one rank or across those that share the keys.

    One dispatcher serves all processors of all models with equal settings, so that blocks which are alike share their
    compiled code.
    """

    def __init__(self, settings: DispatcherSettings) -> None:
        self.settings = settings
        self.subclasses: dict[type, type] = {}
        # Tensors may be on a CPU although the plan is for a GPU: Diffusers' offload, or a test.
        devices = {"cpu": detect_hardware("cpu"), settings.hardware.device: settings.hardware}
        self._devices = {name: (hardware, available_kernels(hardware)) for name, hardware in devices.items()}
        self._named = None if settings.backend == "auto" else as_installed(KERNELS[settings.backend])
        if settings.across is not None:
            settings.across.serve(self.attend)

    def dispatch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        """Stand in for `diffusers.models.attention_dispatch.dispatch_attention_fn`, whose arguments it takes.

        Stock serves the call outside a pipeline call of ours, and where the user gave the processor a backend or
        Diffusers' own parallelism: an explicit choice wins. Stock also serves dropout, causal masks, grouped queries
        and backend-specific arguments, unless a kernel was named that then would not run.

        Raises:
            UnsupportedError: the kernel that the user named cannot take the call.
        """
        # What a user compiles may run outside our calls, so only what our own compile traces is ours.
        ours = is_tracing_our_call() if torch.compiler.is_compiling() else _attention_is_on()
        special = dropout_p != 0.0 or is_causal or enable_gqa or bool(attention_kwargs)
        # Attention to the tokens of an adapter, which every rank has, is marked like the others but has other keys.
        across = parallel_config is ACROSS_RANKS and key.shape[1] == query.shape[1]
        parallel_config = None if parallel_config is ACROSS_RANKS else parallel_config
        theirs = backend is not None or parallel_config is not None
        if ours and special and not theirs and self.settings.backend not in ("auto", "sdpa"):
            modes = "dropout, a causal mask, grouped queries or special arguments"
            return _refuse(query, refusal(self.settings.backend, "it has no such mode", modes))[0]
        if ours and across:
            assert self.settings.across is not None
            if special or backend is not None:
                sentence = "ranks cannot share a sequence under a backend set by set_attention_backend(), dropout or a "
                return _refuse(query, f"{sentence}causal mask; call reset_attention_backend() or use parallel=None")[0]
            return self.settings.across(query, key, value, attn_mask, scale=scale)
        if theirs or special or not ours:
            return dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )
        out = self.attend(query, key, value, attn_mask, scale=scale)
        assert isinstance(out, torch.Tensor)
        return out

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Attended:
        """Compute attention of `q` to `k` and `v`, all `(batch, tokens, heads, head_dim)`.

        Args:
            q: queries.
            k: keys.
            v: values.
            mask: boolean (True: attend) or additive, as for `scaled_dot_product_attention`, or `(batch, keys)`.
            scale: of the scores; `head_dim ** -0.5` where not given.
            return_lse: return the natural log-sum-exp, float32 `(batch, heads, tokens)`, as well.

        Raises:
            UnsupportedError: the kernel that the user named cannot take the call.
        """
        kind, device, head_dim = mask_kind(mask, q, k), q.device.type, q.shape[-1]
        backend, tier = self.settings.backend, self.settings.tier
        if self._named is None:
            hardware, installed = self._devices[device]
            choice = choose_kernel(q.shape[1], k.shape[1], head_dim, q.dtype, kind, hardware, tier, installed)
            kernel = choice.kernel
        else:
            kernel = self._named
            against = refuses(kernel, device=device, dtype=q.dtype, head_dim=head_dim, mask=kind)
            if against is not None:
                call = f"{q.dtype} on {device}, head dimension {head_dim}, mask: {kind}"
                out, lse = _refuse(q, refusal(backend, against, call))
                return (out, lse) if return_lse else out
        return kernel.function(q, k, v, mask, return_lse, scale=scale, right_padded=self.settings.right_padded)


@torch.library.custom_op("pipeboost::refuse", mutates_args=())
def _refuse(q: torch.Tensor, sentence: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raise `UnsupportedError`. An operator, because an error raised while torch.compile traces loses its type."""
    raise UnsupportedError(sentence)


@_refuse.register_fake
def _refuse_shapes(q: torch.Tensor, sentence: str) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _attention_is_on() -> bool:
    call = current_call()
    return call is not None and call.has("attention")


_dispatchers: weakref.WeakValueDictionary[DispatcherSettings, Dispatcher] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def dispatcher_for(settings: DispatcherSettings) -> Dispatcher:
    """Return the dispatcher with these settings; there is one as long as someone holds it."""
    with _lock:
        dispatcher = _dispatchers.get(settings)
        if dispatcher is None:
            dispatcher = _dispatchers[settings] = Dispatcher(settings)
        return dispatcher
