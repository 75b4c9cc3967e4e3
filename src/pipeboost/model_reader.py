"""Reads what a plan needs to know off a pipeline, loaded or without weights; the one way to a `ModelInfo`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.families import Family
from pipeboost.core.hardware import free_memory, has_cuda
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.distributed import world_size
from pipeboost.features.attention.swap import swappable_processors
from pipeboost.features.compile import capture_obstacles
from pipeboost.features.compile.vae import is_compiled, is_rewritable, key_of
from pipeboost.features.offload.budget import bytes_on, kind_of, weigh
from pipeboost.features.offload.place import placed_components, stock_offload, unmovable_weights
from pipeboost.features.parallel.rank_share import of_all_ranks, splits_of
from pipeboost.features.quantize import of_original, quantizable


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
    components = tuple(
        of_original(of_all_ranks(component, modules[component.path]), modules[component.path])
        for component in weigh(modules, family)
    )
    model = next(iter(denoisers.values()))
    hooks, odd_blocks = capture_obstacles(denoisers.values(), family)
    vae = getattr(pipe, "vae", None)
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
        hooks=hooks,
        odd_blocks=odd_blocks,
        heads=heads if isinstance(heads, int) else None,
        ranks=ranks,
        splits=splits_of(modules, family) if ranks > 1 else None,
        quantizable=quantizable(denoisers, family),
        vae=_vae_of(vae) if isinstance(vae, nn.Module) else None,
        vae_key=key_of(vae) if isinstance(vae, nn.Module) else "",
        stock_denoisers={
            path: stock_class(module).__name__
            for path, module in modules.items()
            if kind_of(path, family) == ("transformers", None)
            and {"timestep", "t"} & signature_of(stock_class(module), "forward").parameters.keys()
        },
    )


def _vae_of(vae: nn.Module) -> Literal["causal", "compiled", "other"]:
    if not is_rewritable(vae):
        return "other"
    return "compiled" if is_compiled(vae) else "causal"
