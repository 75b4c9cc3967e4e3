"""FLUX.1: dev, schnell, Kontext, Fill, image-to-image, inpainting, ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeboost.families import Blocks, Family


def branches(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """Two forwards a step with true CFG: a scale above 1 and a negative prompt, given as text or as embeddings."""
    given = arguments.get("negative_prompt") is not None or (
        arguments.get("negative_prompt_embeds") is not None
        and arguments.get("negative_pooled_prompt_embeds") is not None
    )
    return 2 if given and arguments.get("true_cfg_scale", 1.0) > 1 else 1


FAMILY = Family(
    name="flux",
    pipelines=(
        "FluxPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxFillPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
    transformers=("FluxTransformer2DModel",),
    denoisers=("transformer",),
    text_encoders=("text_encoder", "text_encoder_2"),
    blocks=(
        Blocks(path="transformer_blocks", returns="text_image", text_dims={}),
        Blocks(path="single_transformer_blocks", returns="text_image", text_dims={}),
    ),
    padded_text=None,
    branches=branches,
    full_sizes=(),
)
