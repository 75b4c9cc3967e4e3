"""The families that there are, and which of them a pipeline is of.

`patches/` declares ours; other packages add theirs through the entry-point group `pipeboost.patches`. A pipeline
without a family gets `generic_family`, which knows only what Diffusers declares.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family, TensorSharding
from pipeboost.core.seams import stock_class

GENERIC = "generic"
"""Name of the family of pipelines that no family claims."""


def text_encoder_sharding(encoder: Any) -> TensorSharding | None:
    """How the weights of a text encoder are split in tensor parallelism; None where that is not known."""
    from pipeboost.patches.text_encoders import TEXT_ENCODERS  # type: ignore[import-not-found]

    names = [cls.__name__ for cls in stock_class(encoder).__mro__]
    return next((TEXT_ENCODERS[name] for name in names if name in TEXT_ENCODERS), None)


@functools.cache
def families() -> tuple[Family, ...]:
    """All families: ours and those that installed packages declare in the entry-point group `pipeboost.patches`."""
    return tuple(entry.load() for entry in entry_points(group="pipeboost.patches"))


def family_of(pipe: Any) -> Family:
    """The family of a Diffusers pipeline; `generic_family` where none claims its class.

    Raises:
        UnsupportedError: not a Diffusers pipeline, or one without a transformer.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise UnsupportedError(f"pipe must be a Diffusers pipeline, not {type(pipe).__name__}")
    names = [cls.__name__ for cls in stock_class(pipe).__mro__]
    for family in families():
        if any(name in family.pipelines for name in names) and family.models(pipe):
            return family
    present = {name: component is not None for name, component in pipe.components.items()}
    return generic_family(stock_class(pipe).__name__, present)


def family_named(pipeline_class: str) -> Family | None:
    """The family that claims a pipeline class name, or None."""
    return next((family for family in families() if pipeline_class in family.pipelines), None)


def generic_family(pipeline: str, components: Mapping[str, bool]) -> Family:
    """What can be said of a pipeline that no family claims.

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
        name=GENERIC,
        pipelines=(pipeline,),
        transformers=(),
        denoisers=denoisers,
        blocks=(),
        padded_text=None,
        full_sizes=(),
        missing=(
            "which block arguments carry the text length: a new prompt length may recompile",
            "which blocks may be skipped together: caching is refused",
            "where padded text is masked: masks reach the attention kernels as they are",
        ),
    )
