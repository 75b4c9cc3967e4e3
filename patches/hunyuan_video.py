"""HunyuanVideo: text- and image-to-video. Its text is padded, and every block gets a mask over image and text."""

from __future__ import annotations

from typing import Any

import torch

from pipeboost.families import (
    Autoencoder,
    Blocks,
    Family,
    FullSize,
    Measured,
    PaddedText,
    SplitLayers,
    TensorSharding,
    TokenArgument,
    TokenSharding,
    prediction_of_latents,
    stage_doors,
)
from pipeboost.patches.flux import BLOCK_LAYERS  # type: ignore[import-not-found]


def forward_arguments(
    device: Any,
    dtype: Any,
    *,
    height: int = 544,
    width: int = 960,
    frames: int = 33,
    text_tokens: int = 256,
    real_text_tokens: int = 60,
    channels: int = 16,
    text_width: int = 4096,
    pooled_width: int = 768,
) -> dict[str, Any]:
    """Return what `HunyuanVideoPipeline` hands its transformer at mid-schedule: padded text with a mask in `dtype`."""
    latents = (1, channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    mask = torch.zeros(1, text_tokens, device=device, dtype=dtype)
    mask[:, :real_text_tokens] = 1
    return {
        "hidden_states": torch.randn(latents, device=device, dtype=dtype),
        "timestep": torch.full([1], 500.0, device=device, dtype=torch.float32),
        "encoder_hidden_states": torch.randn(1, text_tokens, text_width, device=device, dtype=dtype),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, pooled_width, device=device, dtype=dtype),
        "guidance": torch.full([1], 6.0, device=device, dtype=dtype) * 1000.0,
        "attention_kwargs": None,
        "return_dict": False,
    }


TEXT_DIMS = {"encoder_hidden_states": 1, "attention_mask": 3}

FAMILY = Family(
    name="hunyuan_video",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    transformers=("HunyuanVideoTransformer3DModel",),
    denoisers=("transformer",),
    blocks=(
        Blocks(path="transformer_blocks", returns="image_text", text_dims=TEXT_DIMS),
        Blocks(path="single_transformer_blocks", returns="image_text", text_dims=TEXT_DIMS),
    ),
    padded_text=PaddedText(embeds="encoder_hidden_states", mask="encoder_attention_mask", block_mask="attention_mask"),
    full_sizes=(
        FullSize(
            name="hunyuan-video",
            pipeline="HunyuanVideoPipeline",
            transformer="HunyuanVideoTransformer3DModel",
            config={"guidance_embeds": True},
            inputs=forward_arguments,
            workload="544×960, 33 frames: 18,360 video + 256 text tokens, of which 60 are real",
        ),
    ),
    measured=(
        Measured(
            hardware="H100",
            tier="lossless",
            workload="544×960, 33 frames, FlashAttention 3",
            speedup=1.76,
            source="benchmarks/results/hunyuan-video_h100-80gb-hbm3_2026-11-22.md",
        ),
    ),
    doors=stage_doors(text_outputs=("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")),
    prediction=prediction_of_latents,
    token_sharding=TokenSharding(
        streams=(TokenArgument("hidden_states", 1, "image"), TokenArgument("encoder_hidden_states", 1, "text")),
        constants=(
            TokenArgument("attention_mask", 3, "image_text"),
            TokenArgument("freqs_cis", 0, "image"),
            TokenArgument("image_rotary_emb", 0, "image"),
        ),
        leading=("num_tokens",),
        # Its processor takes the text from the end of a sequence by a negative index.
        text_on_every_rank=True,
    ),
    tensor=TensorSharding(
        layers=(
            *BLOCK_LAYERS,
            SplitLayers(
                path="context_embedder.token_refiner.refiner_blocks.*.attn",
                columns=("to_q", "to_k", "to_v"),
                rows=("to_out.0",),
                counts=("heads", "inner_dim"),
            ),
            SplitLayers(
                path="context_embedder.token_refiner.refiner_blocks.*.ff", columns=("net.0.proj",), rows=("net.2",)
            ),
        )
    ),
    autoencoder=Autoencoder(
        local=(
            "HunyuanVideoEncoder3D",
            "HunyuanVideoDecoder3D",
            "HunyuanVideoDownBlock3D",
            "HunyuanVideoUpBlock3D",
            "HunyuanVideoMidBlock3D",
            "HunyuanVideoResnetBlockCausal3D",
            "HunyuanVideoDownsampleCausal3D",
            "HunyuanVideoUpsampleCausal3D",
            "HunyuanVideoCausalConv3d",
        ),
        attention=(("Attention", "AttnProcessor2_0"), ("Attention", "FusedAttnProcessor2_0")),
    ),
)
