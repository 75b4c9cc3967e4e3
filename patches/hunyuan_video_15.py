"""HunyuanVideo-1.5: text- and image-to-video. A guider makes its guidance branches and puts them together."""

from __future__ import annotations

from typing import Any

import torch

from pipeboost.families import Blocks, Family, prediction_of_latents, stage_doors


def prediction(model: Any, hidden_states: Any) -> Any:
    """Allocate memory for a prediction: with patches of one latent each, its channels are the innermost dimension."""
    if (model.config.patch_size_t, model.config.patch_size) != (1, 1):
        return prediction_of_latents(model, hidden_states)
    batch, _, *sizes = hidden_states.shape
    return torch.empty(
        (batch, model.config.out_channels, *sizes),
        dtype=hidden_states.dtype,
        device=hidden_states.device,
        memory_format=torch.channels_last_3d,
    )


FAMILY = Family(
    name="hunyuan_video_15",
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    transformers=("HunyuanVideo15Transformer3DModel",),
    denoisers=("transformer",),
    # Every prompt is padded to one length, and the blocks get it whole.
    blocks=(Blocks(path="transformer_blocks", returns="image_text", text_dims={}),),
    doors=stage_doors(text_outputs=("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")),
    guided=True,
    prediction=prediction,
    guider="guider",
)
