"""Tiny LTX-2: text to video with sound, its two guidance branches in one batch and two more guidance calls a step."""

from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.pipelines import tiny_parts as parts
from tests.pipelines import tiny_tokenizers as tokenizers
from tests.pipelines.tiny_entry import HEAD_DIM, HEADS, HEIGHT, LATENT_CHANNELS, NEGATIVE_PROMPT, WIDTH, TinyPipeline

TEXT_LAYERS = 2
AUDIO_HEAD_DIM = 8
AUDIO_CHANNELS, MEL_BINS = 2, 16


def _text_encoder() -> Gemma3ForConditionalGeneration:
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizers.t5_tokenizer()),
            "hidden_size": parts.TEXT_DIM,
            "intermediate_size": 64,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": parts.INITIALIZER_RANGE,
        },
        vision_config={
            "hidden_size": parts.VISION_DIM,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": parts.VISION_SIZE,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        image_token_index=0,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def _connectors() -> LTX2TextConnectors:
    heads = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in {
            "num_attention_heads": 4,
            "attention_head_dim": parts.TEXT_DIM // 4,
            "num_layers": 1,
            "num_learnable_registers": 8,
        }.items()
    }
    return parts.randomised(
        LTX2TextConnectors(caption_channels=parts.TEXT_DIM, text_proj_in_factor=TEXT_LAYERS + 1, **heads)
    )


def _transformer() -> LTX2VideoTransformer3DModel:
    return parts.randomised(
        LTX2VideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            cross_attention_dim=HEADS * HEAD_DIM,
            audio_in_channels=AUDIO_CHANNELS * MEL_BINS // 4,
            audio_out_channels=AUDIO_CHANNELS * MEL_BINS // 4,
            audio_num_attention_heads=HEADS,
            audio_attention_head_dim=AUDIO_HEAD_DIM,
            audio_cross_attention_dim=HEADS * AUDIO_HEAD_DIM,
            num_layers=3,
            caption_channels=parts.TEXT_DIM,
        )
    )


def _video_vae() -> AutoencoderKLLTX2Video:
    # 32 pixels and 8 frames a latent, as in the published one.
    return AutoencoderKLLTX2Video(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_spatial_padding_mode="zeros",
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ).eval()


def _audio_vae() -> AutoencoderKLLTX2Audio:
    return AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 2, 2), num_res_blocks=1, latent_channels=AUDIO_CHANNELS, mel_bins=MEL_BINS
    ).eval()


def _vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        in_channels=2 * MEL_BINS,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
    ).eval()


def _pipe() -> DiffusionPipeline:
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=_video_vae(),
        audio_vae=_audio_vae(),
        text_encoder=_text_encoder(),
        tokenizer=tokenizers.gemma_tokenizer(),
        connectors=_connectors(),
        transformer=_transformer(),
        vocoder=_vocoder(),
    )


def _inputs(**more: Any) -> dict[str, Any]:
    return {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": 9,
        "negative_prompt": NEGATIVE_PROMPT,
        "spatio_temporal_guidance_blocks": [1],
        "max_sequence_length": 32,
        **more,
    }


ENTRIES = (
    # A step calls for both branches at once, for skipped attention, and for video and sound apart.
    TinyPipeline(name="ltx2", family="ltx2", make=_pipe, inputs=_inputs, branches=3),
)
