"""`ModelInfo`: what a plan needs to know of a pipeline, and what one of the ranks that share it has of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipeboost.contract.registry import text_encoder_sharding
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Activations, Family, Linear, TensorSharding
from pipeboost.core.hardware import free_memory, has_cuda
from pipeboost.core.seams import stock_class
from pipeboost.distributed import world_size
from pipeboost.features.attention import swappable_processors
from pipeboost.features.offload import (
    Component,
    bytes_on,
    kind_of,
    placed_components,
    stock_offload,
    unmovable_weights,
    weigh,
)
from pipeboost.features.parallel import (
    bytes_on_other_ranks,
    split_bytes,
    tensor_degrees,
)

_UNSHARED = 0.2
"""The part of shared activations that every rank has whole, borders and workspaces, at most: of two ranks each took
0.43 to 0.60 of the whole (benchmarks/results/parallel_2xh200_2026-11-22.md)."""


@dataclass(frozen=True)
class Split:
    """What tensor parallelism can split of one component.

    Attributes:
        nbytes: of the weights that it splits; the others are whole on every rank.
        degrees: into how many parts.
    """

    nbytes: int
    degrees: tuple[int, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What a plan needs to know of the pipeline's models, without their weights.

    Attributes:
        pipeline: class name of the pipeline.
        dtype: the transformer's.
        weights: bytes of the weights.
        weighed: whose weights those are.
        offloaded: whether Diffusers' own CPU offload is on.
        components: what each component weighs; empty where that is not known.
        device: where the pipeline is to run; None for the hardware's first device.
        free: bytes that the pipeline could take there, its weights included; None for all of the device's memory.
        unmovable: component → reason, for each whose weights offload cannot move.
        controlnet: whether a ControlNet adds residuals between the transformer's blocks.
        encodes: whether it has an `encode_prompt`.
        processors: how many attention processors can be swapped; None where nobody has looked.
        stock_processors: class name and reason, for each kind of processor that cannot.
        stock_denoisers: component → class name, for each model that a step calls beside the transformers.
        model: class name of the transformer.
        heads: its attention heads, None where it does not say.
        ranks: how many processes there are to run the pipeline.
        splits: component → what tensor parallelism can split of it, without those that it cannot split; None where that
            was not asked.
        activations: what the stages take besides weights, on one rank; None where no family tells.
    """

    pipeline: str
    dtype: torch.dtype
    weights: int
    weighed: str = "all components"
    offloaded: bool = False
    components: tuple[Component, ...] = ()
    device: torch.device | None = None
    free: int | None = None
    unmovable: Mapping[str, str] = field(default_factory=dict)
    controlnet: bool = False
    encodes: bool = True
    processors: int | None = None
    stock_processors: tuple[tuple[str, str], ...] = ()
    stock_denoisers: Mapping[str, str] = field(default_factory=dict)
    model: str = "the transformer"
    heads: int | None = None
    ranks: int = 1
    splits: Mapping[str, Split] | None = None
    activations: Activations | None = None

    def degrees(self, denoisers: Sequence[str]) -> tuple[int, ...] | None:
        """The degrees of tensor parallelism that all of its denoisers allow; None where that was not asked."""
        if self.splits is None:
            return None
        present = [component.path for component in self.components if component.path in denoisers]
        allowed = [set(self.splits[path].degrees) if path in self.splits else set() for path in present]
        return tuple(sorted(set.intersection(*allowed))) if allowed else ()


def model_info(
    pipe: Any, family: Family, device: torch.device, *, ranks: int | None = None, weighed: str = "all components"
) -> ModelInfo:
    """Read off a pipeline, loaded or on the meta device, what a plan for it on `device` needs to know.

    Args:
        ranks: how many processes are to run it; None for those there are.
        weighed: whose weights are there.
    """
    ranks = world_size() if ranks is None else ranks
    denoisers = family.models(pipe)
    modules = placed_components(pipe)
    # Weights that a folder still holds will be plain ones.
    loaded = {path: module for path, module in modules.items() if not any(each.is_meta for each in module.parameters())}
    reasons = {path: unmovable_weights(module) for path, module in loaded.items()}
    swappable = [swappable_processors(model) for model in denoisers.values()]
    components = tuple(_whole(component, modules[component.path]) for component in weigh(modules, family))
    model = next(iter(denoisers.values()))
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return ModelInfo(
        pipeline=type(pipe).__name__,
        dtype=model.dtype,
        weights=sum(component.nbytes for component in components),
        weighed=weighed,
        offloaded=stock_offload(pipe),
        components=components,
        device=device,
        free=free_memory(device) + bytes_on(device, modules.values()) if device.type == "cuda" and has_cuda() else None,
        unmovable={path: reason for path, reason in reasons.items() if reason is not None},
        controlnet=pipe.components.get("controlnet") is not None,
        encodes=callable(getattr(pipe, "encode_prompt", None)),
        processors=sum(report.swapped for report in swappable),
        stock_processors=tuple(dict.fromkeys(pair for report in swappable for pair in report.left)),
        model=stock_class(model).__name__,
        heads=heads if isinstance(heads, int) else None,
        ranks=ranks,
        splits=splits_of(modules, family) if ranks > 1 else None,
        stock_denoisers={
            path: stock_class(module).__name__
            for path, module in modules.items()
            if kind_of(path, family) == ("transformers", None) and _takes_timestep(module)
        },
    )


def _takes_timestep(module: nn.Module) -> bool:
    forward: Any = stock_class(module)
    return bool({"timestep", "t"} & inspect.signature(forward.forward).parameters.keys())


def splits_of(modules: Mapping[str, nn.Module], family: Family) -> dict[str, Split]:
    """What tensor parallelism can split of each component: transformers and text encoders."""
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
            found[path] = Split(split_bytes(module, sharding), tensor_degrees(module, sharding))
        except UnsupportedError:  # `shard_weights` says why, should a degree be asked for
            continue
    return found


def split_kinds(layout: ParallelConfig | None) -> tuple[str, ...]:
    """The kinds of components of which a rank has a share of the weights."""
    if layout is None or layout.tensor == 1:
        return ()
    return ("transformers", "text_encoders") if layout.shares_text_encoders else ("transformers",)


def of_one_rank(model: ModelInfo, layout: ParallelConfig | None) -> ModelInfo:
    """The model of one of the ranks that share the pipeline's weights."""
    kinds = split_kinds(layout)
    if layout is None or not kinds:
        return model
    components = tuple(
        _share(component, layout.tensor, model.splits) if component.kind in kinds else component
        for component in model.components
    )
    weights = sum(component.nbytes for component in components) if components else model.weights
    return replace(model, components=components, weights=weights, weighed=f"{model.weighed}, this rank's share,")


def activations_of_one_rank(whole: Activations | None, layout: ParallelConfig | None, tier: str) -> Activations | None:
    """What the stages take on one of the ranks that share tokens and the VAE, at most."""
    if whole is None or layout is None:
        return whole
    tokens = layout.ulysses * layout.ring
    strips = tokens * layout.cfg * layout.tensor if layout.shares_vae(tier) else 1
    return replace(whole, denoising=_part(whole.denoising, tokens), decoding=_part(whole.decoding, strips))


def _share(component: Component, degree: int, splits: Mapping[str, Split] | None) -> Component:
    """What a rank has of a component; an even part where nobody has looked at its layers."""
    split = Split(component.nbytes, (degree,)) if splits is None else splits.get(component.path)
    if split is None or degree not in split.degrees:
        return component
    return _of_size(component, component.nbytes - split.nbytes + split.nbytes // degree)


def _whole(component: Component, module: nn.Module) -> Component:
    """A component as it is once an acceleration that has split its weights among ranks is undone."""
    return _of_size(component, component.nbytes + bytes_on_other_ranks(module))


def _of_size(component: Component, nbytes: int) -> Component:
    if nbytes == component.nbytes:
        return component
    return replace(
        component,
        nbytes=nbytes,
        block_bytes=component.block_bytes * nbytes // component.nbytes,
        largest_block=component.largest_block * nbytes // component.nbytes,
    )


def _part(whole: Linear, ranks: int) -> Linear:
    share = _UNSHARED + (1 - _UNSHARED) / ranks
    return Linear(whole.fixed * share, whole.per_pixel * share)
