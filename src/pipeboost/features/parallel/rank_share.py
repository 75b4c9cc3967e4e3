"""What one of the ranks that share a pipeline has of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from pipeboost.contract.model_info import ComponentSize, ModelInfo, Split
from pipeboost.contract.registry import text_encoder_sharding
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Activations, Family, Linear
from pipeboost.core.sharding import TensorSharding
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
