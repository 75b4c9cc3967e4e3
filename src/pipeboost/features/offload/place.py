"""`place` moves to the host what waits there, and wraps its methods; `residing` is the length of a call."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeboost.core.config import OffloadConfig
from pipeboost.core.families import Family
from pipeboost.core.hardware import device_of_weights, has_cuda
from pipeboost.core.ledger import Ledger
from pipeboost.core.obstacles import hooks_in
from pipeboost.core.seams import stock_class
from pipeboost.features.offload.budget import STAGES, kind_of, repeated_blocks
from pipeboost.features.offload.component import Session, StagedComponent, StagePart
from pipeboost.features.offload.copy_stream import CopyStream
from pipeboost.features.offload.stream import tensors_of

METHODS = ("__call__", "encode", "decode", "_encode", "generate", "get_text_features", "get_image_features")
"""Methods by which pipelines enter their components."""

EXECUTION_DEVICE = "_execution_device"
"""The pipeline's property that says where its inputs and latents belong."""

_placed: weakref.WeakKeyDictionary[nn.Module, StagedComponent] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Placement:
    """Where the components of one pipeline are between their stages.

    Attributes:
        device: where they work; with an index, where the device has one.
        text_encoders: policy of text and image encoders.
        transformers: of the denoisers and what is called with them.
        vae: of the autoencoders.
    """

    device: torch.device
    text_encoders: str
    transformers: str
    vae: str


def placed_components(pipe: Any) -> dict[str, nn.Module]:
    """Return the components that have weights, by attribute of the pipeline."""
    return {path: module for path, module in pipe.components.items() if isinstance(module, nn.Module)}


def unmovable_weights(module: nn.Module) -> str | None:
    """Return why a module's weights cannot be views of a flat buffer; None where they can."""
    for tensor in tensors_of(module):
        if type(tensor) not in (torch.Tensor, nn.Parameter) or type(tensor.data) is not torch.Tensor:
            return f"weights of type {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"weights of layout {tensor.layout}"
        if tensor.device.type not in ("cpu", "cuda"):
            return f"weights on the {tensor.device.type} device"
    return None


def stock_offload(pipe: Any) -> bool:
    """Whether Diffusers' own offload (model, sequential or group) is on."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    hooked = [module for module in placed_components(pipe).values() if hooks_in(module) is not None]
    return any(hasattr(module, "_hf_hook") or _is_group_offload_enabled(module) for module in hooked)


def execution_device(pipe: Any, offload: OffloadConfig | str | None) -> torch.device:
    """Return where the pipeline is to run; with an index where that is CUDA.

    It is where stock runs it (which our own placement, if there is one, does not change). But weights that are asked to
    wait on the host wait for a CUDA device, if there is one: such a pipeline need never have been on it.
    """
    stock: Any = stock_class(pipe)
    device: torch.device = stock._execution_device.__get__(pipe)
    if not stock_offload(pipe):
        placed = [_placed[module] for module in placed_components(pipe).values() if module in _placed]
        if not placed:
            device = device_of_weights(pipe) or device
        device = next((each.home for each in placed if each.home is not None and each.home.type != "cpu"), device)
        waits = isinstance(offload, OffloadConfig) and not offload.all_resident
        if device.type == "cpu" and waits and has_cuda():
            device = torch.device("cuda")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def place(path: str, obj: Any, placement: Placement, family: Family, ledger: Ledger) -> None:
    """Put one component, or for the empty path the pipeline itself, where the placement says; undone by the ledger.

    What has no weights is left alone.

    A component that waits on the host works wherever it is called from: in a `residing` session its weights stay until
    another stage's are loaded, outside of one for the length of the method that was called. The same bits come back.

    Raises:
        UnsupportedError: the host cannot pin the memory, or another pipeline placed this component otherwise.
    """
    if not path:
        ledger.add_middleware(obj, EXECUTION_DEVICE, lambda call_next, owner: placement.device, place="pipe.offload")
        return
    if not isinstance(obj, nn.Module):
        return
    kind, part = kind_of(path, family)
    policy: str = getattr(placement, kind)

    def apply(inner: Ledger) -> None:
        if policy == "resident":
            _make_resident(obj, placement.device, inner)
        else:
            blocks = repeated_blocks(path, obj, family) if policy == "layerwise" else []
            _stage(path, obj, placement.device, StagePart(STAGES[kind], part), blocks, inner)

    if policy != "resident" or any(tensor.device != placement.device for tensor in tensors_of(obj)):
        ledger.share(obj, "offload", (policy, placement.device), apply)


@contextlib.contextmanager
def residing(pipe: Any) -> Iterator[None]:
    """The length of a call: what is loaded inside stays while its stage lasts, and nothing stays afterwards.

    Calls that use the same components run one after the other, since one would unload what the other computes with.
    """
    modules = placed_components(pipe).values() if _placed else ()
    components = sorted({_placed[module] for module in modules if module in _placed}, key=id)
    with contextlib.ExitStack() as stack:
        for component in components:  # in one order everywhere, so that two calls never wait for each other
            stack.enter_context(component.lock)
        for component in components:
            if not component.loaded:
                component.bring_to_host()
        session = Session(components)
        outer = [component.session for component in components]
        for component in components:
            component.session = session
        try:
            yield
        finally:
            for component, before in zip(components, outer, strict=True):
                component.session = before
            session.end()


def _make_resident(module: nn.Module, device: torch.device, ledger: Ledger) -> None:
    homes = [(tensor, tensor.device) for tensor in tensors_of(module)]
    ledger.record("weights on the device", functools.partial(_send_home, homes, device, weakref.ref(module)))
    module.to(device)


def _send_home(
    homes: Sequence[tuple[torch.Tensor, torch.device]], device: torch.device, reference: weakref.ref[nn.Module]
) -> None:
    module = reference()
    if module is None or hasattr(module, "_hf_hook"):
        return
    for tensor, home in homes:
        if tensor.device == device:
            tensor.data = tensor.data.to(home)


def _stage(
    path: str, module: nn.Module, device: torch.device, stage: StagePart, blocks: Sequence[nn.Module], ledger: Ledger
) -> None:
    ledger.record("weights on the host", functools.partial(_release, weakref.ref(module)))
    component = _placed[module] = StagedComponent(path, module, CopyStream(device), stage, blocks)
    component.bring_to_host()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # where single weights were, no large buffer fits
    for method in METHODS:
        if callable(getattr(stock_class(module), method, None)):
            ledger.add_middleware(module, method, component.run, place="component.offload")
    for index, block in enumerate(blocks):
        ledger.add_middleware(block, "__call__", functools.partial(component.run_block, index), place="block.offload")


def _release(reference: weakref.ref[nn.Module]) -> None:
    module = reference()
    if module is not None and module in _placed:
        # Diffusers' own offload, turned on meanwhile, expects the weights on the host and moves them itself.
        _placed[module].release(torch.device("cpu") if hasattr(module, "_hf_hook") else None)
        del _placed[module]
