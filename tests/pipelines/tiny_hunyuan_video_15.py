"""Tiny HunyuanVideo-1.5: text to video, its guidance branches made and put together by a guider."""

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import ByT5Tokenizer

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
)

# Tokens of the chat template before the prompt: what the pipeline crops.
TEMPLATE_TOKENS = 8


def _transformer() -> HunyuanVideo15Transformer3DModel:
    # The noise, the encoded picture and a mask channel.
    return parts.randomised(
        HunyuanVideo15Transformer3DModel(
            in_channels=2 * LATENT_CHANNELS + 1,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=parts.TEXT_DIM,
            text_embed_2_dim=parts.TEXT_DIM,
            image_embed_dim=parts.VISION_DIM,
            rope_axes_dim=(4, 6, 6),
            target_size=HEIGHT,
        )
    )


def _pipe() -> DiffusionPipeline:
    pipe = HunyuanVideo15Pipeline(
        text_encoder=parts.qwen_vl().model.language_model,
        tokenizer=tokenizers.qwen_chat_tokenizer(),
        transformer=_transformer(),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 8, 8, 16),
            layers_per_block=1,
            spatial_compression_ratio=8,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=parts.t5_encoder(vocabulary=384),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )
    # The published lengths make 1985 tokens, of which the tiny prompts fill some ten.
    pipe.system_message, pipe.prompt_template_encode_start_idx = "video", TEMPLATE_TOKENS
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 30, 6, 3
    return pipe


def _inputs() -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "negative_prompt": NEGATIVE_PROMPT}


ENTRIES = (TinyPipeline(name="hunyuan_video_15", family="hunyuan_video_15", make=_pipe, inputs=_inputs, branches=2),)
