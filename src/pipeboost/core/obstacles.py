"""What keeps a module from being captured as a graph, as the attributes of all inside it show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def modules_of(root: nn.Module) -> list[nn.Module]:
    """Return what `root.modules()` yields, in its order, without a Python frame for each module."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting += reversed(module._modules.values())
    return list(found.values())


def hook_of(members: Mapping[str, Any]) -> str | None:
    """Describe the hooks of Diffusers or accelerate that a module's attributes show; None where there are none."""
    if "_hf_hook" in members:
        return "an offload hook of accelerate"
    registry = members.get("_diffusers_hook")
    # A pipeline's `cache_context` leaves an empty one.
    if registry is not None and registry.hooks:
        return f"a hook of Diffusers: {', '.join(registry.hooks)}"
    return None


def hooks_in(module: nn.Module) -> str | None:
    """Describe the hooks of a module and all inside it, as `hook_of` does."""
    marked = [vars(each) for each in modules_of(module) if "_hf_hook" in vars(each) or "_diffusers_hook" in vars(each)]
    return next(filter(None, map(hook_of, marked)), None)


def odd_weights_of(module: nn.Module) -> str | None:
    """Return the type of a module's own weights that are no plain tensors, as quantised ones; None where all are."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"weights of type {type(tensor).__name__}"
    return None
