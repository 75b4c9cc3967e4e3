"""Tiny pipelines of models that pipeboost has no family for: two transformers, and a UNet that it must refuse."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from tests.pipelines import tiny_parts as parts
from tests.pipelines import tiny_tokenizers as tokenizers
from tests.pipelines.tiny_entry import (
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LATENT_CHANNELS,
    NEGATIVE_PROMPT,
    WIDTH,
    TinyPipeline,
)


def _sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * parts.TEXT_DIM,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=2 * parts.TEXT_DIM,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=parts.randomised(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.image_vae(latent_channels=LATENT_CHANNELS),
        text_encoder=parts.clip_text_encoder(projection=True),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=parts.clip_text_encoder(projection=True),
        tokenizer_2=tokenizers.clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _pixart_sigma() -> DiffusionPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=4,
        cross_attention_dim=HEADS * HEAD_DIM,
        caption_channels=parts.TEXT_DIM,
        sample_size=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizers.t5_tokenizer(),
        text_encoder=parts.t5_encoder(),
        vae=parts.image_vae(latent_channels=LATENT_CHANNELS),
        transformer=parts.randomised(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def _stable_diffusion() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=parts.TEXT_DIM,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        unet=parts.randomised(unet),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        vae=parts.image_vae(latent_channels=LATENT_CHANNELS),
        text_encoder=parts.clip_text_encoder(),
        tokenizer=tokenizers.clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _inputs(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "guidance_scale": 4.0, "negative_prompt": NEGATIVE_PROMPT, **more}


ENTRIES = (
    TinyPipeline(name="sd3", make=_sd3, inputs=_inputs),
    TinyPipeline(
        name="pixart_sigma",
        make=_pixart_sigma,
        inputs=lambda: _inputs(max_sequence_length=35, use_resolution_binning=False, clean_caption=False),
    ),
    TinyPipeline(name="stable_diffusion", make=_stable_diffusion, inputs=_inputs, denoisers=("unet",)),
)
