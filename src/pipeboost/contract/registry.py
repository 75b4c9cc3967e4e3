"""The families that there are, and which of them a pipeline is of.

`patches/` declares ours; other packages add theirs through the entry-point group `pipeboost.patches`. A pipeline is of
the family that lists its class, else of the one that lists the class of its transformers, of which it gets what holds
in any pipeline. One without either gets `generic_family`, which knows only what Diffusers declares.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import TensorSharding


def text_encoder_sharding(encoder: Any) -> TensorSharding | None:
    """Return how the weights of a text encoder are split in tensor parallelism; None where that is not known."""
    from pipeboost.patches.text_encoders import TEXT_ENCODERS  # type: ignore[import-not-found]

    names = [cls.__name__ for cls in stock_class(encoder).__mro__]
    return next((TEXT_ENCODERS[name] for name in names if name in TEXT_ENCODERS), None)


@functools.cache
def families() -> tuple[Family, ...]:
    """Return all families: ours, and what installed packages declare in the entry-point group `pipeboost.patches`."""
    return tuple(entry.load() for entry in entry_points(group="pipeboost.patches"))


def family_of(pipe: Any) -> Family:
    """Return the family of a Diffusers pipeline: by its class, else by that of its transformers, else `generic_family`.

    Raises:
        UnsupportedError: not a Diffusers pipeline, or one without a transformer.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise UnsupportedError(f"pipe must be a Diffusers pipeline, not {type(pipe).__name__}")
    for family in families():
        if _is_one_of(pipe, family.pipelines) and family.models(pipe):
            return family
    name = stock_class(pipe).__name__
    for family in families():
        models = family.models(pipe).values()
        if models and all(_is_one_of(model, family.transformers) for model in models):
            return _in_any_pipeline(family, name)
    return generic_family(name, {path: component is not None for path, component in pipe.components.items()})


def family_named(pipeline_class: str) -> Family | None:
    """Return the family that claims a pipeline class name, or None."""
    return next((family for family in families() if pipeline_class in family.pipelines), None)


def _is_one_of(obj: Any, names: tuple[str, ...]) -> bool:
    return any(cls.__name__ in names for cls in stock_class(obj).__mro__)


def _in_any_pipeline(family: Family, pipeline: str) -> Family:
    """Return what of a family holds for its models whatever script calls them, and how often."""
    padding = ("how it pads its text: masks reach the attention kernels as they are",) if family.padded_text else ()
    return Family(
        name=family.name,
        pipelines=(),
        transformers=family.transformers,
        denoisers=family.denoisers,
        blocks=family.blocks,  # not `padded_text`: that it is padded on the right is the script's doing
        token_sharding=family.token_sharding,
        tensor=family.tensor,
        autoencoder=family.autoencoder,
        missing=(f"which forwards {pipeline} makes in a step: a cache and cfg ranks are refused", *padding),
    )


def generic_family(pipeline: str, components: Mapping[str, bool]) -> Family:
    """Return what can be said of a pipeline that no family claims.

    Args:
        pipeline: its class name.
        components: the names of its components, and whether each is there.

    Raises:
        UnsupportedError: it has no transformer.
    """
    denoisers = tuple(name for name in ("transformer", "transformer_2") if components.get(name))
    if not denoisers:
        unet = " (its denoiser is a U-Net, which pipeboost does not accelerate)" if components.get("unet") else ""
        raise UnsupportedError(f"{pipeline} has no transformer to accelerate{unet}")
    return Family(
        name="generic",
        pipelines=(),
        transformers=(),
        denoisers=denoisers,
        missing=(
            "which block arguments carry the text length: a new prompt length may recompile",
            "which blocks may be skipped together: caching is refused",
            "where padded text is masked: masks reach the attention kernels as they are",
        ),
    )
