"""Qwen-Image: text-to-image, Edit, EditPlus (2509, 2511)."""

from __future__ import annotations

from typing import Any

import torch

from pipeboost.families import (
    Autoencoder,
    Blocks,
    Family,
    FullSize,
    Measured,
    SplitLayers,
    TensorSharding,
    TokenArgument,
    TokenSharding,
    prediction_of_tokens,
    stage_doors,
)


def forward_arguments(
    device: Any,
    dtype: Any,
    *,
    height: int = 1024,
    width: int = 1024,
    text_tokens: int = 128,
    channels: int = 64,
    text_width: int = 3584,
) -> dict[str, Any]:
    """Return what `QwenImagePipeline` hands its transformer for one prompt (so without a mask) at mid-schedule."""
    rows, columns = height // 16, width // 16
    return {
        "hidden_states": torch.randn(1, rows * columns, channels, device=device, dtype=dtype),
        "timestep": torch.full([1], 500.0, device=device, dtype=dtype) / 1000,
        "guidance": None,
        "encoder_hidden_states_mask": None,
        "encoder_hidden_states": torch.randn(1, text_tokens, text_width, device=device, dtype=dtype),
        "img_shapes": [[(1, rows, columns)]],
        "attention_kwargs": {},
        "return_dict": False,
    }


FAMILY = Family(
    name="qwen_image",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
    ),
    transformers=("QwenImageTransformer2DModel",),
    denoisers=("transformer",),
    blocks=(
        Blocks(
            path="transformer_blocks",
            returns="text_image",
            text_dims={"encoder_hidden_states": 1, "encoder_hidden_states_mask": 1, "image_rotary_emb.1": 0},
        ),
    ),
    full_sizes=(
        FullSize(
            name="qwen-image",
            pipeline="QwenImagePipeline",
            transformer="QwenImageTransformer2DModel",
            config={},
            inputs=forward_arguments,
            workload="1024×1024, one guidance branch: 4096 image + 128 text tokens",
        ),
    ),
    measured=(
        Measured(
            hardware="H100",
            tier="lossless",
            workload="1024×1024, FlashAttention 3",
            speedup=1.35,
            source="benchmarks/results/qwen-image_h100-80gb-hbm3_2026-11-22.md",
        ),
    ),
    doors=stage_doors(text_outputs=("prompt_embeds", "prompt_embeds_mask")),
    guided=True,
    prediction=prediction_of_tokens,
    token_sharding=TokenSharding(
        streams=(TokenArgument("hidden_states", 1, "image"), TokenArgument("encoder_hidden_states", 1, "text")),
        constants=(
            TokenArgument("image_rotary_emb.0", 0, "image"),
            TokenArgument("image_rotary_emb.1", 0, "text"),
            TokenArgument("encoder_hidden_states_mask", 1, "text"),
            TokenArgument("modulate_index", 1, "image"),
        ),
        forward=(TokenArgument("controlnet_block_samples", 1, "image"),),
    ),
    tensor=TensorSharding(
        layers=(
            SplitLayers(
                path="transformer_blocks.*.attn",
                columns=("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
                rows=("to_out.0", "to_add_out"),
                counts=("heads", "inner_dim"),
            ),
            SplitLayers(path="transformer_blocks.*.img_mlp", columns=("net.0.proj",), rows=("net.2",)),
            SplitLayers(path="transformer_blocks.*.txt_mlp", columns=("net.0.proj",), rows=("net.2",)),
            # A third of the weights of a block, for one row of activations.
            SplitLayers(path="transformer_blocks.*", gathered=("img_mod.1", "txt_mod.1")),
        )
    ),
    autoencoder=Autoencoder(
        local=(
            "QwenImageEncoder3d",
            "QwenImageDecoder3d",
            "QwenImageUpBlock",
            "QwenImageMidBlock",
            "QwenImageResidualBlock",
            "QwenImageResample",
            "QwenImageUpsample",
            "QwenImageCausalConv3d",
            "QwenImageRMS_norm",
        ),
        attention=(("QwenImageAttentionBlock", ""),),
        activated={
            "QwenImageResidualBlock": ("norm1", "norm2"),
            "QwenImageEncoder3d": ("norm_out",),
            "QwenImageDecoder3d": ("norm_out",),
        },
    ),
)
