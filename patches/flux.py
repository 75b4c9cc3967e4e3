"""FLUX.1: dev, schnell, Kontext, Fill, image-to-image, inpainting, ControlNet."""

from __future__ import annotations

from typing import Any

import torch

from pipeboost.families import (
    Activations,
    Autoencoder,
    Blocks,
    Compiling,
    Family,
    FullSize,
    Linear,
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
    text_tokens: int = 512,
    channels: int = 64,
    text_width: int = 4096,
    pooled_width: int = 768,
) -> dict[str, Any]:
    """Return what `FluxPipeline` hands its transformer at mid-schedule: one token for each 16×16 pixels, at random."""
    rows, columns = height // 16, width // 16
    image_ids = torch.zeros(rows, columns, 3, device=device, dtype=dtype)
    image_ids[..., 1] += torch.arange(rows, device=device)[:, None]
    image_ids[..., 2] += torch.arange(columns, device=device)[None, :]
    return {
        "hidden_states": torch.randn(1, rows * columns, channels, device=device, dtype=dtype),
        "timestep": torch.full([1], 500.0, device=device, dtype=dtype) / 1000,
        "guidance": torch.full([1], 3.5, device=device, dtype=torch.float32),
        "pooled_projections": torch.randn(1, pooled_width, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text_tokens, text_width, device=device, dtype=dtype),
        "txt_ids": torch.zeros(text_tokens, 3, device=device, dtype=dtype),
        "img_ids": image_ids.reshape(rows * columns, 3),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


BLOCK_LAYERS = (
    SplitLayers(
        path="transformer_blocks.*.attn",
        columns=("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
        rows=("to_out.0", "to_add_out"),
        counts=("heads", "inner_dim"),
    ),
    SplitLayers(path="transformer_blocks.*.ff", columns=("net.0.proj",), rows=("net.2",)),
    SplitLayers(path="transformer_blocks.*.ff_context", columns=("net.0.proj",), rows=("net.2",)),
    SplitLayers(
        path="single_transformer_blocks.*",
        columns=("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        packed_rows={"proj_out": ("attn.to_v", "proj_mlp")},
        counts=("attn.heads", "attn.inner_dim"),
    ),
    # A third of the weights of a block, for one row of activations.
    SplitLayers(path="transformer_blocks.*", gathered=("norm1.linear", "norm1_context.linear")),
    SplitLayers(path="single_transformer_blocks.*", gathered=("norm.linear",)),
)
"""How blocks with two streams and blocks with one are split, also those of HunyuanVideo."""

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
    blocks=(
        Blocks(path="transformer_blocks", returns="text_image", text_dims={}),
        Blocks(path="single_transformer_blocks", returns="text_image", text_dims={}, cached_with_previous=True),
    ),
    full_sizes=(
        FullSize(
            name="flux.1-dev",
            pipeline="FluxPipeline",
            transformer="FluxTransformer2DModel",
            config={"guidance_embeds": True},
            inputs=forward_arguments,
            workload="1024×1024: 4096 image + 512 text tokens",
        ),
    ),
    measured=(
        Measured(
            hardware="H100",
            tier="lossless",
            workload="1024×1024, FlashAttention 3",
            speedup=1.40,
            source="benchmarks/results/flux.1-dev_h100-80gb-hbm3_2026-11-22.md",
        ),
    ),
    activations=Activations(
        denoising=Linear(fixed=111_029_056, per_pixel=413.618),
        decoding=Linear(fixed=56_286_674, per_pixel=2433.023),
        text_encoding=293_298_130,
        width=1024,
        height=1024,
        frames=1,
        source="benchmarks/results/residency_flux.1-dev_h100-80gb-hbm3_2026-11-22.md",
    ),
    doors=stage_doors(text_outputs=("prompt_embeds", "pooled_prompt_embeds", "text_ids")),
    prediction=prediction_of_tokens,
    token_sharding=TokenSharding(
        streams=(TokenArgument("hidden_states", 1, "image"), TokenArgument("encoder_hidden_states", 1, "text")),
        constants=(TokenArgument("image_rotary_emb", 0, "text_image"),),
        forward=(
            TokenArgument("controlnet_block_samples", 1, "image"),
            TokenArgument("controlnet_single_block_samples", 1, "image"),
        ),
    ),
    tensor=TensorSharding(layers=BLOCK_LAYERS),
    autoencoder=Autoencoder(
        local=(
            "Encoder",
            "Decoder",
            "DownEncoderBlock2D",
            "UpDecoderBlock2D",
            "UNetMidBlock2D",
            "ResnetBlock2D",
            "Downsample2D",
            "Upsample2D",
        ),
        attention=(("Attention", "AttnProcessor2_0"), ("Attention", "FusedAttnProcessor2_0")),
        compiling=Compiling(seconds=19.7, saved=0.052, workload="1024×1024", hardware="H200"),
    ),
)
