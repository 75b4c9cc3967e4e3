"""What one of the ranks that share a pipeline has of it: its device, and its share of the models.

Some components wait on the host until their weights are split.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipeboost.contract.model_info import ComponentSize, ModelInfo, Split
from pipeboost.contract.registry import family_of, text_encoder_sharding
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Activations, Family, Linear
from pipeboost.core.hardware import device_of
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import TensorSharding
from pipeboost.distributed import local_device, world_size
from pipeboost.features.parallel.tensor import shares_of, split_of

_UNSHARED = 0.2
"""The part of shared activations that every rank has whole, borders and workspaces, at most: of two ranks each took
0.43 to 0.60 of the whole (benchmarks/results/parallel_2xh200_2026-11-22.md)."""


def splits_of(modules: Mapping[str, nn.Module], family: Family) -> dict[str, Split]:
    """Return what tensor parallelism can split of each component: transformers and text encoders."""
    found = {}
    for path, module in modules.items():
        sharding: TensorSharding | None = None
        if path in family.denoisers:
            sharding = family.tensor
        elif path.startswith("text_encoder"):
            sharding = text_encoder_sharding(module)
        if sharding is None:
            continue
        try:
            found[path] = split_of(module, sharding)
        except UnsupportedError:  # `shard_weights` says why, should a degree be asked for
            continue
    return found


def of_one_rank(model: ModelInfo, layout: ParallelConfig) -> ModelInfo:
    """Return the model of one of the ranks that share the pipeline's weights."""
    if not layout.split_kinds:
        return model
    components = tuple(
        _share(component, layout.tensor, model.splits) if component.kind in layout.split_kinds else component
        for component in model.components
    )
    weights = sum(component.nbytes for component in components) if components else model.weights
    return replace(model, components=components, weights=weights, weighed=f"{model.weighed}, this rank's share,")


def activations_of_one_rank(whole: Activations | None, layout: ParallelConfig, tier: str) -> Activations | None:
    """Return what the stages take on one of the ranks that share tokens and the VAE, at most."""
    if whole is None:
        return None
    tokens = layout.ulysses * layout.ring
    strips = tokens * layout.cfg * layout.tensor if layout.shares_vae(tier) else 1
    return replace(whole, denoising=_part(whole.denoising, tokens), decoding=_part(whole.decoding, strips))


def of_all_ranks(component: ComponentSize, module: nn.Module) -> ComponentSize:
    """Return a component as it is once an acceleration that has split its weights among ranks is undone."""
    shares = shares_of(module)
    return component if shares is None else component.resized(component.nbytes + shares.whole_bytes - shares.own_bytes)


def _share(component: ComponentSize, degree: int, splits: Mapping[str, Split] | None) -> ComponentSize:
    """Return what a rank has of a component; an even part where its layers were not looked at."""
    split = Split(component.nbytes, (degree,)) if splits is None else splits.get(component.path)
    if split is None or degree not in split.degrees:
        return component
    return component.resized(component.nbytes - split.nbytes + split.nbytes // degree)


def _part(whole: Linear, ranks: int) -> Linear:
    share = _UNSHARED + (1 - _UNSHARED) / ranks
    return Linear(whole.fixed * share, whole.per_pixel * share)


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
