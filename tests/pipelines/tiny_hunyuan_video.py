"""Tiny HunyuanVideo: text to video with and without true CFG, image to video in its two conditioning styles."""

from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from tests.pipelines import tiny_parts as parts
from tests.pipelines import tiny_tokenizers as tokenizers
from tests.pipelines.tiny_entry import (
    FRAMES,
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LATENT_CHANNELS,
    TRUE_CFG,
    WIDTH,
    TinyPipeline,
    picture,
)


def _transformer(**settings: Any) -> HunyuanVideoTransformer3DModel:
    defaults = {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 3,
        "num_single_layers": 4,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": parts.TEXT_DIM,
        "pooled_projection_dim": parts.TEXT_DIM,
        "rope_axes_dim": (4, 6, 6),
    }
    return parts.randomised(HunyuanVideoTransformer3DModel(**{**defaults, **settings}))


def _pipe(pipeline_class: type[DiffusionPipeline], **components: Any) -> DiffusionPipeline:
    return pipeline_class(
        tokenizer=tokenizers.llama_tokenizer(),
        vae=parts.hunyuan_video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=parts.clip_text_encoder(),
        tokenizer_2=tokenizers.clip_tokenizer(),
        **components,
    )


def _text_to_video() -> DiffusionPipeline:
    return _pipe(HunyuanVideoPipeline, text_encoder=parts.llama(), transformer=_transformer())


def _image_to_video(**settings: Any) -> DiffusionPipeline:
    return _pipe(
        HunyuanVideoImageToVideoPipeline,
        text_encoder=parts.llava(),
        transformer=_transformer(**settings),
        image_processor=tokenizers.clip_image_processor(parts.LLAVA_SIZE),
    )


def _latent_concat() -> DiffusionPipeline:
    # The noise, the encoded picture and a mask channel.
    return _image_to_video(
        in_channels=2 * LATENT_CHANNELS + 1, guidance_embeds=False, image_condition_type="latent_concat"
    )


def _inputs(**more: Any) -> dict[str, Any]:
    # The text is padded to 35 tokens, of which the prompt fills some 9: the attention mask has work to do.
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "max_sequence_length": 35, **more}


ENTRIES = (
    TinyPipeline(
        name="hunyuan_video",
        family="hunyuan_video",
        make=_text_to_video,
        inputs=lambda: _inputs(guidance_scale=6.0),
    ),
    TinyPipeline(
        name="hunyuan_video_true_cfg",
        family="hunyuan_video",
        make=_text_to_video,
        inputs=lambda: _inputs(guidance_scale=1.0, **TRUE_CFG),
        branches=2,
    ),
    TinyPipeline(
        name="hunyuan_video_i2v",
        family="hunyuan_video",
        make=_latent_concat,
        # The pipeline cuts the first four frames off, so nine are needed to have some.
        inputs=lambda: _inputs(image=picture(), num_frames=9, guidance_scale=1.0, **TRUE_CFG),
        branches=2,
    ),
    TinyPipeline(
        name="hunyuan_video_i2v_token_replace",
        family="hunyuan_video",
        make=lambda: _image_to_video(image_condition_type="token_replace"),
        inputs=lambda: _inputs(image=picture(), guidance_scale=6.0),
    ),
)
