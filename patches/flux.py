"""FLUX.1: dev, schnell, Kontext, Fill, image-to-image, inpainting, ControlNet."""

from __future__ import annotations

from pipeboost.families import Blocks, Family, true_cfg_branches


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
    branches=true_cfg_branches,
    full_sizes=(),
)
