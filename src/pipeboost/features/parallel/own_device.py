"""Which device a rank works on, and which components wait on the host until their weights are split."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from pipeboost.contract.model_info import Split
from pipeboost.contract.registry import family_of
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.hardware import device_of
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.distributed import local_device, world_size
from pipeboost.features.parallel.rank_share import splits_of


def to_own_device(pipe: Any) -> None:
    """Move a pipeline that `.to("cuda")` has put on the first device, on every rank, to the one of this rank.

    Components that wait on the host for the ranks to split them stay there.
    """
    if world_size() == 1 or device_of(pipe).type != "cuda":
        return
    device = local_device()
    torch.cuda.set_device(device)
    if device_of(pipe) != device:
        for component in _modules(pipe).values():
            if not _is_on_host(component):
                component.to(device)


def to_be_split(pipe: Any, layout: Any) -> tuple[str, ...]:
    """Return components that may wait on the host for `accelerate_pipeline`, so that no device ever holds a whole one.

    It moves each rank's share to its device. The rest of the pipeline is on that device.

    Args:
        layout: the setting `parallel`; only where it names tensor ranks, components wait.

    Raises:
        UnsupportedError: a text encoder cannot be split, and was asked to be.
    """
    if not isinstance(layout, ParallelConfig) or layout.tensor == 1:
        return ()
    family, modules = family_of(pipe), _modules(pipe)
    if family.tensor is None:
        return ()
    denoisers = tuple(name for name in family.denoisers if name in modules)
    return denoisers + shared_encoders(pipe, layout, splits_of(modules, family))


def take_from_host(model: torch.nn.Module, device: torch.device, ledger: Ledger) -> None:
    """Move the share of a model that has waited on the host to its rank's device, and back before it is made whole."""
    if device.type == "cpu" or not _is_on_host(model):
        return
    reference = weakref.ref(model)

    def apply(inner: Ledger) -> None:
        inner.record(f"device of {stock_class(model).__name__}", back)
        model.to(device)

    def back() -> None:
        target = reference()
        if target is not None:
            target.to("cpu")

    ledger.share(model, "device", device, apply)


def shared_encoders(pipe: Any, layout: ParallelConfig, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Return the text encoders whose weights the ranks share; left to us, those that can be split so.

    Raises:
        UnsupportedError: they were asked to, and one cannot be split.
    """
    if not layout.shares_text_encoders:
        return ()
    shared = []
    for name, component in _modules(pipe).items():
        if not name.startswith("text_encoder"):
            continue
        if name in splits and layout.tensor in splits[name].degrees:
            shared.append(name)
        elif layout.text_encoder is True:
            raise UnsupportedError(
                f"{layout.tensor} ranks cannot share the weights of {name}, a {stock_class(component).__name__}; use "
                "ParallelConfig(text_encoder='auto')"
            )
    return tuple(shared)


def _is_on_host(module: torch.nn.Module) -> bool:
    first = next(module.parameters(), None)
    return first is not None and first.device.type == "cpu"


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
