"""Tiny Wan 2.1 and 2.2: text and image to video, with one transformer, two experts, or expanded timesteps."""

from typing import Any

from diffusers import (
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.pipelines import tiny_parts as parts
from tests.pipelines import tiny_tokenizers as tokenizers
from tests.pipelines.tiny_entry import (
    FRAMES,
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LATENT_CHANNELS,
    NEGATIVE_PROMPT,
    WIDTH,
    TinyPipeline,
    picture,
)

# The noise, a mask channel for each of a latent's four frames, and the encoded picture.
IMAGE_CHANNELS = 2 * LATENT_CHANNELS + 4


def _transformer(*, seed: int = 1, **settings: Any) -> WanTransformer3DModel:
    defaults = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": parts.TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 2 * HEADS * HEAD_DIM,
        "num_layers": 4,
        "rope_max_seq_len": 64,
    }
    return parts.randomised(WanTransformer3DModel(**{**defaults, **settings}), seed=seed)


def _pipe(pipeline_class: type[DiffusionPipeline], **components: Any) -> DiffusionPipeline:
    return pipeline_class(
        tokenizer=tokenizers.t5_tokenizer(),
        text_encoder=parts.umt5_encoder(),
        vae=parts.wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **components,
    )


def _image_to_video() -> DiffusionPipeline:
    return _pipe(
        WanImageToVideoPipeline,
        transformer=_transformer(
            in_channels=IMAGE_CHANNELS, image_dim=parts.VISION_DIM, added_kv_proj_dim=HEADS * HEAD_DIM
        ),
        image_encoder=parts.clip_vision_encoder(),
        image_processor=tokenizers.clip_image_processor(parts.VISION_SIZE),
    )


def _experts(pipeline_class: type[DiffusionPipeline], *, in_channels: int) -> DiffusionPipeline:
    # Four steps at shift 3 visit the timesteps 999, 900, 750 and 500: two for each expert.
    return _pipe(
        pipeline_class,
        transformer=_transformer(in_channels=in_channels),
        transformer_2=_transformer(in_channels=in_channels, seed=2),
        boundary_ratio=0.875,
    )


def _inputs(**more: Any) -> dict[str, Any]:
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return {**size, "guidance_scale": 4.0, "negative_prompt": NEGATIVE_PROMPT, "max_sequence_length": 32, **more}


ENTRIES = (
    TinyPipeline(
        name="wan21_t2v",
        family="wan",
        make=lambda: _pipe(WanPipeline, transformer=_transformer()),
        inputs=_inputs,
        branches=2,
    ),
    TinyPipeline(
        name="wan21_i2v", family="wan", make=_image_to_video, inputs=lambda: _inputs(image=picture()), branches=2
    ),
    TinyPipeline(
        name="wan22_t2v",
        family="wan",
        make=lambda: _experts(WanPipeline, in_channels=LATENT_CHANNELS),
        inputs=lambda: _inputs(guidance_scale_2=3.0),
        denoisers=("transformer", "transformer_2"),
        branches=2,
        steps=4,
    ),
    TinyPipeline(
        name="wan22_i2v",
        family="wan",
        make=lambda: _experts(WanImageToVideoPipeline, in_channels=IMAGE_CHANNELS),
        inputs=lambda: _inputs(image=picture(), guidance_scale_2=3.0),
        denoisers=("transformer", "transformer_2"),
        branches=2,
        steps=4,
    ),
    TinyPipeline(
        name="wan22_ti2v_text",
        family="wan",
        make=lambda: _pipe(WanPipeline, transformer=_transformer(), expand_timesteps=True),
        inputs=_inputs,
        branches=2,
    ),
    TinyPipeline(
        name="wan22_ti2v_image",
        family="wan",
        make=lambda: _pipe(WanImageToVideoPipeline, transformer=_transformer(), expand_timesteps=True),
        inputs=lambda: _inputs(image=picture()),
        branches=2,
    ),
)
