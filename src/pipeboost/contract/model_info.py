"""`ModelFacts`: what a plan needs to know of a pipeline, and what one of the ranks that share it has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipeboost.contract.registry import text_encoder_sharding
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Activations, Family, Linear, TensorSharding
from pipeboost.core.hardware import free_memory
from pipeboost.core.seams import stock_class
from pipeboost.distributed import world_size
from pipeboost.features.attention import swappable_processors
from pipeboost.features.compile import capture_obstacles
from pipeboost.features.offload import (
    Component,
    bytes_on,
    placed_components,
    stock_offload,
    unmovable_weights,
    weigh,
)
from pipeboost.features.parallel import (
    bytes_on_other_ranks,
    shares_text_encoders,
    shares_vae,
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
class ModelFacts:
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
        processors: how many attention processors can be swapped, None where the model is not loaded.
        stock_processors: class name and reason, for each kind of processor that cannot.
        model: class name of the transformer.
        hooks: those of Diffusers or accelerate in the transformers' blocks, in words; they cannot be compiled.
        odd_blocks: what else may keep the blocks from being compiled, in words.
        heads: its attention heads, None where it does not say.
        ranks: how many processes there are to run the pipeline.
        splits: component → what tensor parallelism can split of it, without those that it cannot split; None where that
            was not asked.
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
    model: str = "the transformer"
    hooks: str | None = None
    odd_blocks: str | None = None
    heads: int | None = None
    ranks: int = 1
    splits: Mapping[str, Split] | None = None

    def degrees(self, denoisers: Sequence[str]) -> tuple[int, ...] | None:
        """The degrees of tensor parallelism that all of its denoisers allow; None where that was not asked."""
        if self.splits is None:
            return None
        present = [component.path for component in self.components if component.path in denoisers]
        allowed = [set(self.splits[path].degrees) if path in self.splits else set() for path in present]
        return tuple(sorted(set.intersection(*allowed))) if allowed else ()


def facts_of(pipe: Any, family: Family, device: torch.device) -> ModelFacts:
    """Read the facts off a loaded pipeline that is to run on `device`."""
    denoisers = family.models(pipe)
    modules = placed_components(pipe)
    reasons = {path: unmovable_weights(module) for path, module in modules.items()}
    swappable = [swappable_processors(model) for model in denoisers.values()]
    components = tuple(_whole(component, modules[component.path]) for component in weigh(modules, family))
    model = next(iter(denoisers.values()))
    hooks, odd_blocks = capture_obstacles(denoisers.values(), family)
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return ModelFacts(
        pipeline=type(pipe).__name__,
        dtype=model.dtype,
        weights=sum(component.nbytes for component in components),
        offloaded=stock_offload(pipe),
        components=components,
        device=device,
        free=free_memory(device) + bytes_on(device, modules.values()) if device.type == "cuda" else None,
        unmovable={path: reason for path, reason in reasons.items() if reason is not None},
        controlnet=pipe.components.get("controlnet") is not None,
        encodes=callable(getattr(pipe, "encode_prompt", None)),
        processors=sum(report.swapped for report in swappable),
        stock_processors=tuple(dict.fromkeys(pair for report in swappable for pair in report.left)),
        model=stock_class(model).__name__,
        hooks=hooks,
        odd_blocks=odd_blocks,
        heads=heads if isinstance(heads, int) else None,
        ranks=world_size(),
        splits=splits_of(modules, family) if world_size() > 1 else None,
    )


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
    return ("transformers", "text_encoders") if shares_text_encoders(layout) else ("transformers",)


def of_one_rank(facts: ModelFacts, layout: ParallelConfig | None) -> ModelFacts:
    """The facts of one of the ranks that share the pipeline's weights."""
    kinds = split_kinds(layout)
    if layout is None or not kinds:
        return facts
    components = tuple(
        _share(component, layout.tensor, facts.splits) if component.kind in kinds else component
        for component in facts.components
    )
    weights = sum(component.nbytes for component in components) if components else facts.weights
    return replace(facts, components=components, weights=weights, weighed=f"{facts.weighed}, this rank's share,")


def activations_of_one_rank(whole: Activations | None, layout: ParallelConfig | None, tier: str) -> Activations | None:
    """What the stages take on one of the ranks that share tokens and the VAE, at most."""
    if whole is None or layout is None:
        return whole
    tokens = layout.ulysses * layout.ring
    strips = tokens * layout.cfg * layout.tensor if shares_vae(layout, tier) else 1
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
