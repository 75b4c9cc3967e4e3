"""Wan: 2.1 text- and image-to-video, 2.2 with two experts, TI2V; FastWan has the same architecture."""

from __future__ import annotations

from typing import Any

import torch

from pipeboost.families import (
    Activations,
    Autoencoder,
    Blocks,
    Family,
    FullSize,
    Linear,
    Measured,
    SplitLayers,
    TensorSharding,
    TokenArgument,
    TokenSharding,
    prediction_of_latents,
    stage_doors,
)


def forward_arguments(
    device: Any,
    dtype: Any,
    *,
    height: int = 480,
    width: int = 832,
    frames: int = 81,
    text_tokens: int = 512,
    real_text_tokens: int = 60,
    channels: int = 16,
    text_width: int = 4096,
) -> dict[str, Any]:
    """Return what `WanPipeline` hands its transformer at mid-schedule; the text is padded with zeros and not masked."""
    latents = (1, channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    text = torch.randn(1, text_tokens, text_width, device=device, dtype=dtype)
    text[:, real_text_tokens:] = 0
    return {
        "hidden_states": torch.randn(latents, device=device, dtype=dtype),
        "timestep": torch.full([1], 500, device=device, dtype=torch.int64),
        "encoder_hidden_states": text,
        "attention_kwargs": None,
        "return_dict": False,
    }


def expert_steps(pipe: Any) -> tuple[int, ...]:
    """Timesteps at or above the boundary belong to the first transformer, the others to the second."""
    timesteps = pipe.scheduler.timesteps[-pipe.num_timesteps :]
    boundary_ratio = pipe.config.get("boundary_ratio")
    if boundary_ratio is None:
        return len(timesteps), 0
    first = int((timesteps >= boundary_ratio * pipe.scheduler.config.num_train_timesteps).sum())
    return first, len(timesteps) - first


FAMILY = Family(
    name="wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    transformers=("WanTransformer3DModel",),
    denoisers=("transformer", "transformer_2"),
    blocks=(Blocks(path="blocks", returns="image", text_dims={}),),
    full_sizes=(
        FullSize(
            name="wan2.1-1.3b",
            pipeline="WanPipeline",
            transformer="WanTransformer3DModel",
            config={"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
            inputs=forward_arguments,
            workload="480×832, 81 frames, one guidance branch: 32,760 video + 512 text tokens",
        ),
        FullSize(
            name="wan2.1-14b",
            pipeline="WanPipeline",
            transformer="WanTransformer3DModel",
            config={"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
            inputs=forward_arguments,
            workload="480×832, 81 frames, one guidance branch: 32,760 video + 512 text tokens",
        ),
    ),
    measured=(
        Measured(
            hardware="H100",
            tier="lossless",
            workload="1.3B, 480×832, 81 frames, FlashAttention 3",
            speedup=1.40,
            source="benchmarks/results/wan2.1-1.3b_h100-80gb-hbm3_2026-11-22.md",
        ),
    ),
    # At one size only, so other sizes are estimated by proportion; decoding in float32, as the model card asks.
    activations=Activations(
        denoising=Linear(fixed=0, per_pixel=29.5),
        decoding=Linear(fixed=0, per_pixel=291.8),
        text_encoding=279_000_000,
        width=832,
        height=480,
        frames=81,
        source="benchmarks/results/executor_h100-80gb-hbm3_2026-11-22.md",
    ),
    expert_steps=expert_steps,
    doors=stage_doors(text_outputs=("prompt_embeds", "negative_prompt_embeds")),
    guided=True,
    prediction=prediction_of_latents,
    token_sharding=TokenSharding(
        streams=(TokenArgument("hidden_states", 1, "image"),),
        constants=(TokenArgument("rotary_emb", 1, "image"),),
        # Wan 2.2 TI2V has a timestep for each token.
        outputs={
            "condition_embedder": (TokenArgument("0", 1, "image", ndim=3), TokenArgument("1", 1, "image", ndim=3))
        },
    ),
    tensor=TensorSharding(
        layers=(
            SplitLayers(
                path="blocks.*.attn1",
                columns=("to_q", "to_k", "to_v"),
                rows=("to_out.0",),
                norms=("norm_q", "norm_k"),
                counts=("heads", "inner_dim", "kv_inner_dim"),
            ),
            SplitLayers(
                path="blocks.*.attn2",
                columns=("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"),
                rows=("to_out.0",),
                norms=("norm_q", "norm_k", "norm_added_k"),
                counts=("heads", "inner_dim", "kv_inner_dim"),
            ),
            SplitLayers(path="blocks.*.ffn", columns=("net.0.proj",), rows=("net.2",)),
        )
    ),
    autoencoder=Autoencoder(
        local=(
            "WanEncoder3d",
            "WanDecoder3d",
            "WanUpBlock",
            "WanMidBlock",
            "WanResidualDownBlock",
            "WanResidualUpBlock",
            "WanResidualBlock",
            "WanResample",
            "WanUpsample",
            "WanCausalConv3d",
            "WanRMS_norm",
            "AvgDown3D",
            "DupUp3D",
        ),
        attention=(("WanAttentionBlock", ""),),
        activated={
            "WanResidualBlock": ("norm1", "norm2"),
            "WanEncoder3d": ("norm_out",),
            "WanDecoder3d": ("norm_out",),
        },
    ),
)
